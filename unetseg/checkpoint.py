"""What a run folder holds: weights, settings, history, training state. Nothing loaded here can run code."""

import csv
import hashlib
import io
import json
import zipfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .classes import CLASS_SETS, VOID_RULES
from .files import atomic_open, read_bytes, read_json
from .model import MOST

WEIGHTS, CONFIG, HISTORY, STATE = "model.safetensors", "config.json", "history.csv", "state.pt"
METADATA = ("stage", "class_set", "channels", "depth", "width", "height", "void", "seed", "precision", "parameters")
METADATA += ("device", "torch", "commit")
KNOWN = {key: {str(n) for n in range(1, most + 1)} for key, most in {**MOST, "width": 8192, "height": 8192}.items()}
KNOWN |= {"class_set": CLASS_SETS, "void": VOID_RULES}


def save_weights(run: Path, state: dict[str, Tensor], config: dict, epoch: int, val_miou: float) -> None:
    """Write a model's state as safetensors, with the METADATA of its run, its epoch and val mIoU, and a checksum."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    metadata = {key: str(config[key]) for key in METADATA}
    metadata |= {"epoch": str(epoch), "val_miou": f"{val_miou:.6f}", "sha256": checksum(tensors)}
    content = safetensors.torch.save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))  # safetensors itself writes them in any order
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_open(run / WEIGHTS, durable=True) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(content)[end:])


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and contents."""
    sum_ = hashlib.sha256()
    for key in sorted(tensors):
        sum_.update(key.encode())
        sum_.update(tensors[key].reshape(-1).view(torch.uint8).numpy())
    return sum_.hexdigest()


def weights_path(run_or_weights: Path) -> Path:
    """The weights file of a run folder, or the file itself. Raises ValueError when there is none."""
    path = run_or_weights / WEIGHTS if run_or_weights.is_dir() else run_or_weights
    if not path.is_file():
        raise ValueError(f"{path}: expected trained weights, found nothing; train first, or check the path")
    return path


def load_weights(run_or_weights: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A run folder's or a file's weights and their metadata. Raises ValueError naming a file that holds others."""
    path = weights_path(run_or_weights)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a safetensors file, found {error}") from None
    missing = sorted({*METADATA, "epoch", "sha256"} - metadata.keys())
    if missing:
        raise ValueError(f"{path}: expected weights saved by unetseg, found none of the metadata {missing}")
    wrong = [f"{key} {metadata[key][:50]}" for key, known in KNOWN.items() if metadata[key] not in known]
    if wrong:
        raise ValueError(f"{path}: expected weights of a network as unetseg trains them, found {', '.join(wrong)}")
    if checksum(state) != metadata["sha256"]:
        raise ValueError(f"{path}: expected the weights that were saved, found others (wrong checksum); copy it anew")
    return state, metadata


def save_state(run: Path, state: dict) -> None:
    """Write the training state: tensors, numbers, text, lists and dicts. The one before stays until it is complete."""
    content = io.BytesIO()  # torch.save itself hides why it could not write
    torch.save(state, content)
    with atomic_open(run / STATE, durable=True) as file:
        file.write(content.getbuffer())


def load_state(run: Path) -> dict | None:
    """The training state, or None where there is none yet. Raises ValueError naming a file that is damaged."""
    path = run / STATE
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("compressed content")
            if archive.testzip():
                raise zipfile.BadZipFile("a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(state[key], dict) for key in ("config", "trainer", "position")):
            raise TypeError("no training state")
        return state
    except Exception as error:  # torch names no common base for what a damaged file raises
        reason = str(error).splitlines()[0] if isinstance(error, (zipfile.BadZipFile, OSError)) else ""
        raise ValueError(
            f"{path}: expected a whole training state, found {type(error).__name__} {reason}; delete it to start anew"
        ) from None


def read_config(run: Path) -> dict:
    """config.json of a run folder. Raises ValueError, naming it, when it is damaged or its weights tell otherwise."""
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{path}: expected the settings of a run, found nothing; is {run} a run folder?")
    config = read_json(path)
    missing = sorted({*METADATA, "settings"} - config.keys())
    if missing or not isinstance(config["settings"], dict):
        raise ValueError(f"{path}: expected the settings of a run, found no {missing or 'settings'}; restore it")
    if (run / WEIGHTS).is_file():
        metadata = load_weights(run)[1]
        wrong = [f"{key} {config[key]}, not {metadata[key]}" for key in METADATA if str(config[key]) != metadata[key]]
        if wrong:
            raise ValueError(f"{path}: expected what {WEIGHTS} was trained with, found {'; '.join(wrong)}; restore it")
    return config


def write_history(run: Path, history: list[dict]) -> None:
    """Write one line per epoch as CSV into a run folder."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with atomic_open(run / HISTORY) as file:
        file.write(text.getvalue().encode())


def read_history(run: Path) -> list[dict[str, float]]:
    """The history of a run folder, one dict per epoch; empty where no epoch was finished.

    Raises ValueError naming a file that holds anything but numbers.
    """
    path = run / HISTORY
    if not path.is_file():
        return []
    try:
        rows = csv.DictReader(io.StringIO(read_bytes(path).decode()), strict=True)
        return [{key: float(value) for key, value in row.items()} for row in rows]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: expected one line of numbers per epoch, found {error}; restore it") from None
