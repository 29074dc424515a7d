"""What is here, what it can do, and how long training will take: `python -m unetseg doctor`."""

import os
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import psutil
import torch

from . import capability, device, memory, stages
from .classes import CLASS_SETS
from .data import load_split
from .model import UNet
from .pictures import read_png
from .processed import read_stats
from .raw import DEFAULT_CLASSES, choose_splits, find_layout, list_pairs
from .settings import STAGES

GIB = 1 << 30
CITYSCAPES = {"train": 2975, "val": 250}  # images
SESSION = 12  # hours of a Kaggle session
LEAST_DISK = 2  # GiB for a run's weights, state, pictures and logs


class Doctor:
    """Prints one line per finding and remembers what is to be changed, the first first."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def say(self, what: str, text: str, problem: str = "") -> None:
        print(f"{what:<12} {text}", flush=True)
        if problem:
            self.problems.append(problem)

    def software(self) -> None:
        self.say("Python", f"{platform.python_version()} at {sys.executable}")
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
        self.say("torch", f"{torch.__version__}, {build}")

    def gpus(self) -> None:
        """Every GPU, and whether a kernel runs on it."""
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            name = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / GIB:.0f} GiB"
            try:
                capability.require_kernels(index)
                self.say("GPU", f"{name}: a kernel runs")
            except capability.NoKernels as error:
                self.say("GPU", f"{name}: cannot be used", str(error))
        if not torch.cuda.is_available():
            reason = capability.unused_gpu()
            self.say("GPU", reason or "none; training takes the CPU", reason and f"the GPU is not used: {reason}")

    def machine(self) -> None:
        self.say("CPU", f"{os.cpu_count()} cores, {device.device_name(torch.device('cpu'))}")
        total = psutil.virtual_memory().total
        self.say("memory", f"{memory.free_bytes() / GIB:.1f} of {total / GIB:.1f} GiB free")
        free = shutil.disk_usage(Path.cwd()).free / GIB
        full = (
            f"free some disk space: {free:.1f} GiB are left here, {LEAST_DISK} are needed" if free < LEAST_DISK else ""
        )
        self.say("disk", f"{free:.1f} GiB free in {Path.cwd()}", full)

    def data(self, path: Path | None) -> tuple[int, tuple[int, int], dict[str, int]]:
        """What lies at `path`; returns classes, size (width, height), and images per split to train with."""
        assumed = 7, (256, 256), CITYSCAPES
        if path is None:
            self.say("data", "none given (--data): times are for Cityscapes at 256x256")
            return assumed
        try:
            if (path / "images_processed").is_dir():
                return self._processed(path)
            return self._raw(path)
        except (ValueError, OSError) as error:
            self.say("data", f"{path}: cannot be used", str(error))
            return assumed

    def _processed(self, path: Path) -> tuple[int, tuple[int, int], dict[str, int]]:
        splits = {name: load_split(path, name) for name in ("train", "val")}  # reads and checks every file
        class_set, size = splits["train"].class_set, splits["train"].size
        self.say(
            "data", f"{path}: processed, {class_set.name} (0..{len(class_set) - 1}, void 255), {size[0]}x{size[1]}"
        )
        for name, loaded in splits.items():
            absent = [one for one, pixels in zip(class_set.names, loaded.num_pixels.sum(axis=0)) if not pixels]
            without = f"; without a pixel of {', '.join(absent)}" if absent else "; all classes occur"
            self.say("", f"{name}: {len(loaded)} pairs, {loaded.split.note}{without}")
        for folder in {loaded.split.folder for loaded in splits.values()}:
            if left_out := read_stats(path, folder).get("left_out"):
                self.say("", f"{folder}: {len(left_out)} left out in preprocessing (see stats_{folder}.json)")
        return len(class_set), size, {name: len(loaded) for name, loaded in splits.items()}

    def _raw(self, path: Path) -> tuple[int, tuple[int, int], dict[str, int]]:
        layout = find_layout(path)
        class_set, counts = CLASS_SETS[DEFAULT_CLASSES[layout]], {}
        self.say("data", f"{path}: raw {layout}, to be preprocessed")
        for split in choose_splits(path, layout, None):
            pairs, alone = list_pairs(path, layout, split)
            counts[split] = len(pairs)
            about = f"{split}: {len(pairs)} pairs"
            if pairs and pairs[0].labels:
                ids = read_png(pairs[0].labels, "L")[0]
                unknown = sorted({*np.unique(ids).tolist()} - {*np.flatnonzero(class_set.known).tolist()})
                about += f" of {ids.shape[1]}x{ids.shape[0]}, ids {ids.min()}..{ids.max()} in the first"
                if unknown:
                    self.problems.append(f"{pairs[0].labels}: expected label ids, found {unknown} among them")
            if broken := [str(file) for pair in pairs for file in (pair.image, pair.labels) if file and not ends(file)]:
                about += f"; {len(broken)} truncated files"
                self.problems.append(f"{broken[0]}: expected a whole PNG file, found none; get it anew")
            if not pairs:
                self.problems.append(f"{path}: expected pairs of image and labels in {split}, found none")
            if alone:
                about += f"; {len(alone)} files without their partner, such as {next(iter(alone.values()))}"
            self.say("", about)
        if "train" not in counts:
            self.problems.append(f"{path}: expected a split train, found {', '.join(counts)}")
        return len(class_set), (256, 256), {"train": counts.get("train", 0), "val": counts.get("val", 0)}

    def wandb(self) -> None:
        try:
            from . import tracking  # here, because a broken W&B is a finding
        except ImportError as error:
            self.say("W&B", f"cannot be imported ({error})", "install wandb, or set WANDB_MODE=disabled")
            return
        said: list[str] = []
        try:
            mode, key = tracking.choose_mode(said.append), tracking.server_and_key()[1]
        except ValueError as error:
            self.say("W&B", "its settings cannot be used", f"mend W&B's settings (WANDB_...): {error}")
            return
        if not key:
            said.append("there is no key (WANDB_API_KEY)")
        self.say("W&B", "; ".join([mode, *said]))

    def times(self, num_classes: int, size: tuple[int, int], images: dict[str, int]) -> None:
        """How long each stage takes at its full schedule, by twenty measured steps of the default network."""
        model = UNet(num_classes).to(device.pick_device())
        chosen = device.choose(model, size, compiled="no")
        self.say("precision", str(chosen))
        per_image = stages.seconds_per_image(model, size, chosen)
        work = images["train"] + images["val"] / 3
        hours = {name: stage.epochs * work * per_image / 3600 for name, stage in STAGES.items()}
        parts = ", ".join(f"{name} {duration(hour)}" for name, hour in hours.items())
        sessions = -(-sum(hours.values()) // SESSION)
        fits = "fits a Kaggle session" if sessions <= 1 else f"takes {sessions:.0f} Kaggle sessions"
        self.say("training", f"{1 / per_image:.1f} images/s (channels 32, depth 4, {size[0]}x{size[1]}): {parts}")
        self.say("", f"all three: {duration(sum(hours.values()))}, {fits} of {SESSION} h")


def ends(path: Path) -> bool:
    """Whether a PNG file has its end."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        return b"IEND" in file.read()


def duration(hours: float) -> str:
    """As text: in minutes below one hour."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def examine(data: Path | None) -> int:
    """Print the findings; returns 0 when all is ready, else 1."""
    doctor = Doctor()
    doctor.software()
    doctor.gpus()
    doctor.machine()
    found = doctor.data(data)
    doctor.wandb()
    if not doctor.problems:
        doctor.times(*found)
    print(f"\nto change    {doctor.problems[0]}" if doctor.problems else "\nready")
    return 1 if doctor.problems else 0
