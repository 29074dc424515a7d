"""Store the weights of a finished run in 16 bits, as weights/<name>.safetensors; they predict and start fine-tunings.

python weights/publish.py RUN NAME
"""

import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unetseg.checkpoint import read_about, unfinished, weights_path
from unetseg.files import UserError, atomic_open


def publish(run: Path, name: str) -> Path:
    """Write the file and return its path. Filters become float16; biases and batch statistics stay float32."""
    about, path = read_about(run), Path(__file__).with_name(f"{name}.safetensors")
    if progress := unfinished(about):
        raise UserError(f"{run}: expected a finished run, found {progress}")
    with safetensors.safe_open(weights_path(run), framework="pt") as file:
        metadata = file.metadata()
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    small = {key: value.half() if value.ndim == 4 else value for key, value in weights.items()}
    if not all(torch.isfinite(value).all() for value in small.values()):
        raise UserError(f"{run}: expected weights within the range of float16, found larger ones")
    with atomic_open(path) as file:
        file.write(safetensors.torch.save(small, metadata))
    return path


if __name__ == "__main__":
    made = publish(Path(sys.argv[1]), sys.argv[2])
    print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB")
