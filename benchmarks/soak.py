"""Kill a training and a preprocessing again and again at random moments, and compare what comes out, bit for bit.

    python benchmarks/soak.py --out FOLDER [--kills 20] [--steps 2000] [--seed 0]

Then train for some thousand steps and look at the memory, and time a save of each preset's state. Prints a table and
writes FOLDER/soak.json.
"""

import argparse
import contextlib
import itertools
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg.trainer import Trainer

from unetseg import checkpoint, scenes, stages
from unetseg.data import Batches, load_split
from unetseg.device import device_name
from unetseg.files import write_json
from unetseg.losses import ce_dice
from unetseg.model import UNet

TRAIN = "import sys; from unetseg import engine, __main__; engine.SAVE_SECONDS = 0.2; sys.exit(__main__.main())"
PRESETS = {"quick 16/4": (16, 4), "default 32/4": (32, 4), "published 64/3": (64, 3), "31 M, 64/4": (64, 4)}


def start(command: list) -> subprocess.Popen:
    """Start a command of the repository, quietly, in a process group of its own."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    environment = os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **quiet)


def run_whole(command: list) -> float:
    """Seconds that the command takes to its end. Raises SystemExit when it fails."""
    began = time.monotonic()
    if start(command).wait():
        raise SystemExit(f"failed: {command}")
    return time.monotonic() - began


def soak(command: list, folder: Path, kills: int, until: Callable[[], object], where: Callable, same: Callable) -> dict:
    """Start a command that fills `folder` and kill it, until it was killed `kills` times and then came to its end.

    until  waits for the moment of a kill, given the process
    where  says where the folder stands after a kill
    same   compares the folder with an uninterrupted run's, each time that the command came to its end by itself
    """
    stood, compared = [], []
    while True:
        process = start(command)
        if len(stood) < kills:
            until(process)
            process.kill()  # its workers must notice by themselves
        if process.wait() == -signal.SIGKILL:
            stood.append(where())
            continue
        if process.returncode:
            raise SystemExit(f"failed: {command}")
        compared.append(same())
        if len(stood) >= kills:
            return {"kills": len(stood), "stood": stood, "compared": len(compared), "identical": all(compared)}
        shutil.rmtree(folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_tensors(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def soak_preprocessing(out: Path, raw: Path, kills: int, dice: random.Random) -> dict:
    """Kill it when a random number of images more is there, or, with all of them there, a little later."""
    script, parts = ROOT / "preprocessing" / "image_segmentation_preprocessing.py", out / "pp"
    command = [script, "--data_dir", raw, "--workers", 2, "--output_dir"]
    run_whole([*command, out / "pw"])
    num_images = len(list((out / "pw").rglob("*.npy")))

    def count() -> int:
        return len(list(parts.rglob("*.npy")))

    def until(process: subprocess.Popen) -> None:
        if count() == num_images:
            process.wait()
        enough = count() + dice.randint(1, num_images // 2)
        while process.poll() is None and count() < min(enough, num_images):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.01) if count() < num_images else dice.uniform(0, 1))

    def where() -> str:
        return f"{count()} of {num_images} images, {len(list(parts.rglob('.*.tmp')))} half-written"

    return soak([*command, parts], parts, kills, until, where, lambda: tree(out / "pw") == tree(parts))


def soak_training(out: Path, processed: Path, kills: int, dice: random.Random) -> dict:
    """The quick preset with all that is random; saved every 0.2 s, so as to be killed while saving, too."""
    init, whole, parts = out / "init", out / "tw", out / "tp"
    options = ["--data", processed, "--epochs", 6, "--precision", "fp32"]
    run_whole(["-c", TRAIN, "train", "scratch", *options, "--channels", 16, "--out", init])
    command = ["-c", TRAIN, "train", "ce_dice", *options, "--init", init, "--batch-size", 4, "--out"]
    seconds = run_whole([*command, whole])

    def until(process: subprocess.Popen) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0.4, 0.9) * seconds)

    def where() -> str:
        saved = checkpoint.load_state(parts) if parts.is_dir() else None
        if saved is None:
            return "not begun"
        saving = ", while saving" if list(parts.glob(".*.tmp")) else ""
        return f"epoch {len(saved['position']['history']) + 1}, step {saved['position']['step']}{saving}"

    return soak([*command, parts], parts, kills, until, where, lambda: same_run(whole, parts))


def same_run(whole: Path, parts: Path) -> bool:
    """Whether two run folders hold the same weights, optimiser, schedule, sums and, but for its timings, history."""
    one, other = (checkpoint.load_state(run) for run in (whole, parts))
    for state in (one, other):
        for row in state["position"]["history"]:
            del row["seconds"], row["images_per_second"]
    lines = [[row["val_miou"] for row in checkpoint.read_history(run)] for run in (whole, parts)]
    files = [(run / checkpoint.WEIGHTS).read_bytes() for run in (whole, parts)]
    same = same_tensors(one["trainer"], other["trainer"]) and same_tensors(one["position"], other["position"])
    return same and lines[0] == lines[1] and files[0] == files[1]


def watch_memory(processed: Path, num_steps: int) -> dict:
    """Resident memory while training goes on, and the slope of a line through its second half."""
    train_set = load_split(processed, "train")
    settings = stages.Settings("ce_dice", str(processed), "none", channels=16, depth=4)
    batches = Batches(train_set, 8, torch.device("cpu"), 0, stages.augmentation(settings, train_set))
    trainer = Trainer(UNet(7, 16, 4), num_steps, 1e-3, 0.01, "fp32")
    steps, megabytes, epoch = [], [], 0
    while trainer.scheduler.last_epoch < num_steps:
        epoch += 1
        for images, masks in itertools.islice(batches.epoch(epoch), num_steps - trainer.scheduler.last_epoch):
            trainer.step(images, masks, ce_dice)
            if trainer.scheduler.last_epoch % 20 == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                steps.append(trainer.scheduler.last_epoch)
                megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    half = len(steps) // 2
    slope = float(np.polyfit(steps[half:], megabytes[half:], 1)[0])
    levels = {"first": megabytes[0], "half": megabytes[half], "last": megabytes[-1]}
    return {"steps": steps[-1], **levels, "kilobytes_per_step": slope * 1024}


def time_saves(out: Path) -> dict:
    """Size and seconds of a save of each preset's state, median of five, with its share of the time between two."""
    found = {}
    for name, (channels, depth) in PRESETS.items():
        trainer = Trainer(UNet(7, channels, depth), 10, 1e-3, 0.01, "fp32")
        trainer.step(torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long), ce_dice)
        seconds = []
        for _ in range(5):
            began = time.monotonic()
            checkpoint.save_state(out, {"config": {}, "trainer": trainer.state(), "position": {}})
            seconds.append(time.monotonic() - began)
        size = (out / checkpoint.STATE).stat().st_size / 2**20
        found[name] = {"megabytes": size, "seconds": sorted(seconds), "share": float(np.median(seconds)) / 180}
    (out / checkpoint.STATE).unlink()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice, raw, processed = random.Random(args.seed), args.out / "raw", args.out / "processed"
    scenes.draw_dataset(raw, {"train": 80, "val": 20}, (512, 256), args.seed)
    script = ROOT / "preprocessing" / "image_segmentation_preprocessing.py"
    run_whole([script, "--data_dir", raw, "--size", "64x32", "--output_dir", processed])
    found = {"device": device_name(torch.device("cpu")), "python": platform.python_version()}
    found |= {"torch": str(torch.__version__), "commit": stages.commit(), "seed": args.seed}
    for name, soaked, place in (("preprocessing", soak_preprocessing, raw), ("training", soak_training, processed)):
        found[name] = soaked(args.out, place, args.kills, dice)
        print("{}: {kills} kills, {compared} runs then compared, identical: {identical}".format(name, **found[name]))
        print("  " + "\n  ".join(found[name]["stood"]), flush=True)
    found["memory"] = watch_memory(processed, args.steps)
    levels = "MiB at {steps} steps {last:.0f}, half way {half:.0f}: {kilobytes_per_step:+.3f} KiB a step"
    print(f"memory: {levels.format(**found['memory'])}")
    found["saves"] = time_saves(args.out)
    for name, save in found["saves"].items():
        low, *_, high = save["seconds"]
        print(
            f"a save, {name:<16}{save['megabytes']:>7.0f} MiB {low:.2f} to {high:.2f} s, {save['share']:.2%} of 180 s"
        )
    write_json(args.out / "soak.json", found)
    return 0 if found["preprocessing"]["identical"] and found["training"]["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
