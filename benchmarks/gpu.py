"""What only a GPU can show, in one call of a few minutes, and a table of absolute speeds; one JSON.

    python benchmarks/gpu.py --out FILE.json [--home FOLDER] [--seconds 3]

Without a GPU the same checks run on the CPU as far as they can, or say "not run". It draws its own scenes, and needs the
library's packages, but neither W&B nor a network.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
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


def settings_of(home: Path, name: str, **changes: object) -> Settings:
    chosen = {"channels": 8, "depth": 3, "epochs": 2, "batch_size": 8} | changes
    return Settings("scratch", home / "processed", home / name, **chosen)


def log(row: dict) -> None:
    """In place of W&B."""


def kernel(home: Path) -> dict:
    for index in range(torch.cuda.device_count()):
        device.require_kernels(index)
    where = device.pick_device()
    return {
        "device": device.device_name(where),
        "cards": torch.cuda.device_count(),
        "rule": device.precision_rule(where),
    }


def split_on_the_card(home: Path) -> dict:
    train_set, where = data.load_split(home / "processed", "train"), device.pick_device()
    before, _ = train_set.batch(torch.arange(4), torch.device("cpu"))
    after, _ = train_set.batch(torch.arange(4), where)
    assert torch.allclose(before, after.cpu(), atol=1e-6) and train_set.images.is_cuda == CUDA
    return {"on the card": train_set.images.is_cuda}


def skipped_steps(home: Path) -> dict:
    """fp16 under GradScaler: steps with an infinite loss change no weight, and training goes on."""
    calls: list[int] = []

    def loss_fn(logits, mask, class_weights=None, all_sum=None):
        calls.append(0)
        loss = cross_entropy(logits, mask)
        return loss * float("inf") if torch.is_grad_enabled() and len(calls) in (2, 3) else loss

    LOSSES["spoiled"] = loss_fn
    rows = run.train(settings_of(home, "skipped", precision="fp16", loss="spoiled"), log=log)
    assert rows[0]["skipped_steps"] >= 2 and rows[-1]["train_loss"] < 3
    return {"skipped": [row["skipped_steps"] for row in rows], "train_loss": [row["train_loss"] for row in rows]}


def deterministic_resume(home: Path) -> dict:
    """Stopped after every third batch and resumed: the weights of the uninterrupted run, bit for bit."""
    whole = settings_of(home, "whole", deterministic=True)
    run.train(whole, log=log)
    parts, reason, looks = replace(whole, out=str(home / "parts")), Stopper.reason, []
    Stopper.reason = lambda self, reserve=0.0: looks.append(0) or "test" * (len(looks) % 3 == 0)
    try:
        while len(run.train(parts, log=log)) < whole.epochs:
            pass
    finally:
        Stopper.reason = reason
    models = [checkpoint.load_model(home / name)[0].state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    return {"precision": checkpoint.read_config(home / "whole")["settings"]["precision"], "equal": True}


def two_cards(home: Path) -> dict | str:
    """SyncBatchNorm: two processes against one."""
    if torch.cuda.device_count() < 2:
        return "not run: fewer than two cards"
    one, two = (run.train(settings_of(home, f"cards{n}", num_processes=n, precision="fp32"), log=log) for n in (1, 2))
    return {"train_loss": [[row["train_loss"] for row in rows] for rows in (one, two)]}


def compiled(home: Path) -> dict | str:
    if not CUDA:
        return "not run: no GPU"
    rows = run.train(settings_of(home, "compiled", compile=True), log=log)
    return {"train_loss": [row["train_loss"] for row in rows], "images_per_second": rows[-1]["images_per_second"]}


def out_of_memory(home: Path) -> dict | str:
    if not CUDA:
        return "not run: no GPU"
    torch.cuda.set_per_process_memory_fraction(0.005)
    try:
        run.train(settings_of(home, "memory", channels=64, batch_size=64), log=log)
    except TrainingStopped as error:
        return {"message": str(error)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    raise AssertionError("expected an error")


def images_per_second(preset: str, precision: str, seconds: float, batch: int = 8) -> float:
    """Of training steps at 256x256, after two to warm up."""
    torch.manual_seed(0)
    where = device.pick_device()
    model = UNet(7, *PRESETS[preset]).to(where, memory_format=torch.channels_last).train()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler(where.type)
    images, masks, steps = (
        torch.rand(batch, 3, 256, 256, device=where),
        torch.zeros(batch, 256, 256, device=where).long(),
        0,
    )
    start = time.perf_counter()
    while steps < 3 or time.perf_counter() - start < seconds:
        loss = cross_entropy(forward(model, images, precision), masks)
        (scaler.scale(loss) if precision == "fp16" else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        steps += 1
        if steps == 2:
            start = time.perf_counter()
    return (steps - 2) * batch / (time.perf_counter() - start)


def speeds(home: Path, seconds: float) -> dict:
    presets = PRESETS if CUDA else {"quick": PRESETS["quick"]}
    kinds = ("fp32", "fp16", "bf16") if CUDA else ("fp32", device.precision_rule(torch.device("cpu")))
    return {name: {kind: round(images_per_second(name, kind, seconds), 1) for kind in kinds} for name in presets}


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
    checks: list[Callable] = [kernel, split_on_the_card, skipped_steps, deterministic_resume, two_cards, compiled]
    for check in [*checks, out_of_memory, lambda home: speeds(home, args.seconds)]:
        name, start = getattr(check, "__name__", "").replace("<lambda>", "images_per_second"), time.perf_counter()
        try:
            found[name] = check(args.home)
        except Exception:  # the next check is worth as much
            found[name] = {"failed": traceback.format_exc()}
        print(f"{name}: {time.perf_counter() - start:.1f} s: {found[name]}", flush=True)
        write_json(args.out, found)
    return 1 if any(isinstance(value, dict) and "failed" in value for value in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
