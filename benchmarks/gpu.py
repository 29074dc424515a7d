"""What only a GPU can show, in one call of a few minutes, and a table of absolute speeds; one JSON.

    python benchmarks/gpu.py --out FILE.json [--home FOLDER] [--seconds 3]

Without a GPU the same checks run on the CPU as far as they can, or say "not run". It draws its own scenes, and needs
the library's packages, but neither W&B nor a network.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg import checkpoint, data, device, run
from unetseg.files import make_folder, write_json
from unetseg.losses import LOSSES, cross_entropy
from unetseg.model import UNet
from unetseg.settings import Settings
from unetseg.tools import preprocess, scenes
from unetseg.train import Stopper, TrainingStopped, forward

PRESETS = {"quick": (16, 4), "default": (32, 4), "published": (64, 3), "31 M": (64, 4)}  # channels, depth
CUDA = torch.cuda.is_available()


def train(home: Path, name: str, **changes: object) -> list[dict]:
    """A short run of a small network; its history."""
    chosen = {"model": "unet", "channels": 8, "depth": 3, "epochs": 2, "batch_size": 8} | changes
    return run.train(Settings("scratch", home / "processed", home / name, **chosen), log=lambda row: None)


def card(home: Path) -> dict:
    """A kernel runs on every card, and a split that fits lies on it."""
    for index in range(torch.cuda.device_count()):
        device.require_kernels(index)
    where, train_set = device.pick_device(), data.load_split(home / "processed", "train")
    images = [train_set.batch(torch.arange(4), place)[0].cpu() for place in (torch.device("cpu"), where)]
    assert torch.allclose(*images, atol=1e-6) and train_set.images.is_cuda == CUDA
    names = {"device": device.device_name(where), "cards": torch.cuda.device_count()}
    return names | {"precision_rule": device.precision_rule(where), "split_on_card": train_set.images.is_cuda}


def skipped_steps(home: Path) -> dict:
    """fp16 under GradScaler: steps with an infinite loss are skipped, and training goes on."""
    calls: list[int] = []

    def loss_fn(logits, mask, class_weights=None, all_sum=None):
        calls.append(0)
        spoiled = torch.is_grad_enabled() and len(calls) in (2, 3)
        return cross_entropy(logits, mask) * (float("inf") if spoiled else 1)

    LOSSES["spoiled"] = loss_fn
    rows = train(home, "skipped", precision="fp16", loss="spoiled")
    assert rows[0]["skipped_steps"] >= 2 and rows[-1]["train_loss"] < 3
    return {key: [row[key] for row in rows] for key in ("skipped_steps", "train_loss")}


def deterministic_resume(home: Path) -> dict:
    """Stopped after every third batch and resumed: the weights of the uninterrupted run, bit for bit."""
    train(home, "whole", deterministic=True)
    reason, looks = Stopper.reason, []
    Stopper.reason = lambda self, reserve=0.0: looks.append(0) or "test" * (len(looks) % 3 == 0)
    try:
        while len(train(home, "parts", deterministic=True)) < 2:
            pass
    finally:
        Stopper.reason = reason
    whole, parts = (checkpoint.load_model(home / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    return {"precision": checkpoint.read_config(home / "whole")["settings"]["precision"], "equal": True}


def two_cards(home: Path) -> dict | str:
    """SyncBatchNorm: two processes against one."""
    if torch.cuda.device_count() < 2:
        return "not run: fewer than two cards"
    rows = [train(home, f"cards{number}", num_processes=number, precision="fp32") for number in (1, 2)]
    return {"train_loss": [[row["train_loss"] for row in history] for history in rows]}


def compiled(home: Path) -> dict | str:
    rows = train(home, "compiled", compile=True) if CUDA else []
    return (
        {key: [row[key] for row in rows] for key in ("train_loss", "images_per_second")} if rows else "not run: no GPU"
    )


def out_of_memory(home: Path) -> dict | str:
    if not CUDA:
        return "not run: no GPU"
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        train(home, "memory", channels=64, batch_size=64)
    except TrainingStopped as error:
        return {"message": str(error)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    raise AssertionError("expected an error")


def speed(preset: str, precision: str, seconds: float) -> float:
    """Images/s of training steps of 8 images at 256x256, after two to warm up."""
    device.be_deterministic(False)
    where, steps, start = device.pick_device(), 0, time.perf_counter()
    model = UNet(7, *PRESETS[preset]).to(where, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, masks = torch.rand(8, 3, 256, 256, device=where), torch.zeros(8, 256, 256, device=where).long()
    while steps < 3 or time.perf_counter() - start < seconds:
        loss = cross_entropy(forward(model, images, precision), masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        steps += 1
        start = time.perf_counter() if steps == 2 else start
    return round((steps - 2) * 8 / (time.perf_counter() - start), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--home", type=Path, default=Path("runs/gpu"), help="scratch folder")
    parser.add_argument("--seconds", type=float, default=3.0, help="per speed")
    args = parser.parse_args()
    scenes.draw_dataset(make_folder(args.home / "raw"), {"train": 24, "val": 8}, (256, 128), seed=0)
    made = ["--data_dir", str(args.home / "raw"), "--output_dir", str(args.home / "processed"), "--size", "128x64"]
    assert preprocess.main(made) == 0
    found = {"torch": str(torch.__version__), "python": sys.version.split()[0], "commit": run.commit()}
    for check in (card, skipped_steps, deterministic_resume, two_cards, compiled, out_of_memory):
        try:
            found[check.__name__] = check(args.home)
        except Exception:  # the next check is worth as much
            found[check.__name__] = {"failed": traceback.format_exc()}
        print(check.__name__, found[check.__name__], flush=True)
    kinds = ("fp32", "fp16", "bf16") if CUDA else ("fp32", device.precision_rule(torch.device("cpu")))
    presets = PRESETS if CUDA else ["quick"]
    found["images_per_second"] = {p: {kind: speed(p, kind, args.seconds) for kind in kinds} for p in presets}
    write_json(args.out, found)
    return 1 if any(isinstance(value, dict) and "failed" in value for value in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
