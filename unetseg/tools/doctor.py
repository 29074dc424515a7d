"""What this machine has, and how long training will take on it: `python -m unetseg doctor`."""

import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import device, tracking
from ..data import load_split
from ..files import UserError, file_error, read_bytes
from ..losses import cross_entropy, deep_supervision
from ..model import MODELS
from ..optimizers import OPTIMIZERS
from ..processed import read_stats
from ..settings import INHERITED, PRESETS, TITLES
from ..train import forward
from .judge import judge_ids
from .kaggle import KAGGLE, full_epochs
from .layouts import choose_splits, find_data
from .preprocess import check_ids, choose_classes, count_ids

GIB = 1 << 30
CITYSCAPES = {"train": 2975, "val": 250}  # images
SESSION = 12  # hours of a Kaggle session
MOST_SECONDS = 8.0  # of measured training steps
SAMPLES = 16  # label files read of each split of raw data
LEAST_DISK = 2  # GiB for a run's weights, state, pictures and logs


def examine(data: Path | None) -> int:
    """Print the findings, a line each, and the first thing to change; returns 0 when everything is ready, else 1."""
    problems: list[str] = []

    def finding(name: str, call, *arguments: object) -> object:
        """Print what `call` finds; a UserError is printed and becomes a problem."""
        try:
            said, value = call(*arguments)
        except UserError as error:
            said, value = f"{error}", None
            problems.append(str(error))
        print(f"{name:<12} {said}", flush=True)
        return value

    finding("Python", lambda: (f"{platform.python_version()} at {sys.executable}; torch {torch.__version__}", None))
    finding("device", computing_device)
    finding("disk", disk_space)
    found = finding("data", describe_data, data)
    finding("W&B", describe_wandb)
    if not problems:
        print("training     measuring a few steps ...", file=sys.stderr, flush=True)
        finding("training", forecast, *found)
    print(f"\nto change    {problems[0]}" if problems else "\nready")
    return 1 if problems else 0


def computing_device() -> tuple[str, None]:
    """Every GPU on which a kernel runs, or the CPU and why."""
    for index in range(torch.cuda.device_count()):
        device.require_kernels(index)
    if hidden := device.unused_gpu():
        raise UserError(f"this machine has a GPU that is not used: {hidden}")
    gpus, chosen = map(torch.cuda.get_device_properties, range(torch.cuda.device_count())), device.pick_device()
    names = [f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / GIB:.0f} GiB: a kernel runs" for gpu in gpus]
    names = names or [f"{device.device_name(chosen)}, {os.cpu_count()} cores; no GPU"]
    return f"{'; '.join(names)}; precision {device.precision_rule(chosen)}", None


def disk_space() -> tuple[str, None]:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    if free < LEAST_DISK:
        raise UserError(f"free some disk space: {free:.1f} GiB are left in {Path.cwd()}, {LEAST_DISK} are needed")
    return f"{free:.1f} GiB free in {Path.cwd()}", None


def describe_data(path: Path | None) -> tuple[str, tuple]:
    """What lies at `path`, and classes, size (width, height) and images per split to train with."""
    if path is None:
        return "none given (--data): times are for Cityscapes at 256x256", (7, (256, 256), CITYSCAPES)
    return processed_data(path) if list(path.glob("stats_*.json")) else raw_data(path)


def processed_data(path: Path) -> tuple[str, tuple]:
    """Reads and checks every file of train and val."""
    splits = {name: load_split(path, name) for name in ("train", "val")}
    class_set, size = splits["train"].class_set, splits["train"].size
    lines = [f"{path}: processed, {class_set.name} (0..{len(class_set) - 1}, void 255), {size[0]}x{size[1]}"]
    for name, loaded in splits.items():
        absent = [one for one, pixels in zip(class_set.names, loaded.num_pixels.sum(axis=0)) if not pixels]
        without = f"; without a pixel of {', '.join(absent)}" if absent else "; all classes occur"
        lines.append(f"{name}: {len(loaded)} pairs, {loaded.split.note}{without}")
        stats = read_stats(path, loaded.split.folder)
        if stats["left_out"]:
            lines.append(f"{name}: preprocessing left {len(stats['left_out'])} out (see stats_{stats['split']}.json)")
        lines += [f"{name}: {said}" for said in stats.get("notes", []) + stats.get("warnings", [])]
    return "\n             ".join(lines), (len(class_set), size, {name: len(loaded) for name, loaded in splits.items()})


def raw_data(path: Path) -> tuple[str, tuple]:
    """Lists every file, and reads some label files of each split."""
    data_set = find_data(path)
    class_set, counts = choose_classes(data_set, None), {}
    lines = [f"{data_set.root}: raw {data_set.layout.name}, to be preprocessed", *data_set.notes]
    for split in choose_splits(data_set, None):
        pairs, alone = data_set.pairs(split)
        if not pairs:
            raise UserError(f"{path}: expected pairs of image and labels in {split}, found none")
        counts[split], ids = len(pairs), np.zeros(256, np.int64)
        for pair in pairs[:: 1 + len(pairs) // SAMPLES]:
            labels = data_set.layout.read_labels(pair.labels, read_bytes(pair.labels), class_set)
            check_ids(count_ids(labels), class_set, pair.labels)
            ids += count_ids(labels)
        present = {int(id_): int(ids[id_]) for id_ in np.flatnonzero(ids)}
        if broken := [file for pair in pairs for file in (pair.image, pair.labels) if not is_complete(file)]:
            raise UserError(f"{broken[0]}: expected a complete file ({len(broken)} are truncated); copy it again")
        size = f"{labels.shape[1]}x{labels.shape[0]}"
        about = f"{split}: {len(pairs)} pairs of {size}, ids {min(present)}..{max(present)}"
        about += f"; {len(alone)} files without a partner, such as {next(iter(alone.values()))}" if alone else ""
        lines += [about, *(f"{split}: {said}" for said in judge_ids(split, data_set.layout, class_set, present))]
    if "train" not in counts:
        raise UserError(f"{path}: expected a split train, found {', '.join(counts)}")
    return "\n             ".join(lines), (len(class_set), (256, 256), {"val": 0} | counts)


def is_complete(path: Path) -> bool:
    """Whether a PNG or JPEG file has its end. Raises FileError."""
    try:
        with path.open("rb") as file:
            end = {b"\x89P": b"IEND", b"\xff\xd8": b"\xff\xd9"}.get(file.read(2), b"")
            file.seek(max(path.stat().st_size - 4096, 0))
            return end in file.read() and path.stat().st_size > 0
    except OSError as error:
        raise file_error(error, path) from None


def describe_wandb() -> tuple[str, None]:
    try:
        settings = tracking.user_settings()
        key = tracking.has_key(settings)
    except Exception as error:  # W&B's own errors for wrong settings have no common base class
        advice = "correct its settings (WANDB_...), or set WANDB_MODE=disabled"
        raise UserError(f"W&B cannot be used ({error}): {advice}") from None
    return settings.mode if key or settings.mode != "online" else "offline: there is no key (WANDB_API_KEY)", None


def forecast(num_classes: int, size: tuple[int, int], images: dict[str, int]) -> tuple[str, None]:
    """How long each stage takes with the default network; an image evaluated counts a third of one trained on, and one
    of half the size a quarter."""
    seconds, hours = seconds_per_image(num_classes, size), {}
    for name in TITLES:
        work = images["train"] * (1 - 0.75 * PRESETS[name]["half_size"]) + images["val"] / 3
        hours[name] = full_epochs(name, images["train"]) * work * seconds / 3600
    parts, total = ", ".join(f"{n} {duration(h)}" for n, h in hours.items()), duration(sum(hours.values()))
    network = f"channels {INHERITED['channels']}, depth {INHERITED['depth']}, {size[0]}x{size[1]}"
    if KAGGLE.is_dir():
        total += f", {-(-sum(hours.values()) // SESSION):.0f} of Kaggle's sessions of {SESSION} h"
    return f"{1 / seconds:.1f} images/s ({network}): {parts}\n             all three: {total}", None


def seconds_per_image(num_classes: int, size: tuple[int, int], channels: int = INHERITED["channels"]) -> float:
    """Seconds of training per image: the median of at most ten steps of eight images, after two to warm up."""
    where = device.pick_device()
    model, seconds = MODELS[INHERITED["model"]](num_classes, channels), []
    model = model.to(where, memory_format=torch.channels_last).train()
    optimizer = OPTIMIZERS[PRESETS["scratch"]["optimizer"]](model.parameters(), fused=True)
    images = torch.rand(8, 3, *size[::-1], device=where)
    masks = torch.zeros(8, *size[::-1], dtype=torch.long, device=where)
    while len(seconds) < 12 and (len(seconds) < 3 or sum(seconds) < MOST_SECONDS):
        start = time.perf_counter()
        loss, _ = deep_supervision(cross_entropy, forward(model, images, device.precision_rule(where)), masks)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]) / len(images)


def duration(hours: float) -> str:
    """As text: in minutes below one hour."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
