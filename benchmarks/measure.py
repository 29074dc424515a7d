"""What the benchmarks share: contenders in processes of their own, interleaved repeats, a table and a JSON file."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg import scenes, stages
from unetseg.data import SegmentationSet, load_split
from unetseg.device import device_name, pick_device
from unetseg.files import write_json

SCRIPT = ROOT / "preprocessing" / "image_segmentation_preprocessing.py"
SHARED = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "benchmarks" / "results"
PRESETS = {"quick": (16, 4), "default": (32, 4), "published": (64, 3), "31 M": (64, 4)}
REPEATS = 5


@dataclass
class Row:
    """One line of a table: the ratio of each round, against what, and what was aimed at ("≥ 2.5", "≤ 1.05", "")."""

    what: str
    against: str
    target: str
    ratios: list[float]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    notes: dict = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        if not self.target:
            return None
        sign, aim = self.target.split()
        return self.median >= float(aim) if sign == "≥" else self.median <= float(aim)

    def __str__(self) -> str:
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        spread = f"{self.median:.2f} ({min(self.ratios):.2f}-{max(self.ratios):.2f})"
        return f"{self.what:<72} {self.against:<56} {spread:>19}  {self.target:<6} {verdict}"


class Contender:
    """A step in a process of its own, set up once: `make(*args)` returns the function that `run` times."""

    def __init__(self, make: Callable, *args: object) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args))
        self.process.start()
        theirs.close()
        self.peak = self.run()[1]  # to warm up

    def run(self) -> tuple[float, float]:
        """Seconds of one step, and the process's peak memory so far in MiB."""
        self.pipe.send("go")
        seconds, self.peak = self.pipe.recv()
        return seconds, self.peak

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.pipe.send("end")
        self.process.join(10)
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, make: Callable, args: tuple) -> None:
    step = make(*args)
    with suppress(EOFError):  # the benchmark has ended
        while pipe.recv() == "go":
            start = time.perf_counter()
            step()
            pipe.send((time.perf_counter() - start, peak_memory()))


def settle() -> None:
    """Wait for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> float:
    """The most memory this process has had, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def compare(
    what: str, against: str, target: str, ours: Callable[[], float], theirs: Callable[[], float], **notes: object
) -> Row:
    """Run both in turn, REPEATS times; each gives its seconds. The ratio: ours / theirs for "≤", else the inverse."""
    rounds = [(ours(), theirs()) for _ in range(REPEATS)]
    ratios = [b / a if not target.startswith("≤") else a / b for a, b in rounds]
    row = Row(what, against, target, ratios, {"ours": [a for a, _ in rounds], "theirs": [b for _, b in rounds]}, notes)
    print(row, flush=True)
    return row


def compare_processes(what: str, against: str, target: str, ours: tuple, theirs: tuple, **notes: object) -> Row:
    """`compare` for two Contenders, given as (make, *arguments)."""
    with Contender(*ours) as a, Contender(*theirs) as b:
        row = compare(what, against, target, lambda: a.run()[0], lambda: b.run()[0], **notes)
        row.notes["peak_mebibytes"] = {"ours": a.peak, "theirs": b.peak}
    return row


def environment() -> dict:
    """What the figures hold for."""
    device = pick_device()
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "opencv": cv2.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit measured; the results of other benchmarks do not make it dirty."""
    where = ("--", ".", ":!benchmarks/results", ":!README.md")
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "-uno", *where]
    changed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return stages.commit() if changed else stages.commit().removesuffix("-dirty")


def save(name: str, rows: list[Row], **more: object) -> None:
    """Write RESULTS/<name>.json; on a GPU, report/results/speed/<name>.json."""
    folder = RESULTS if pick_device().type == "cpu" else ROOT / "report" / "results" / "speed"
    table = [asdict(row) | {"median": row.median, "met": row.met} for row in rows]
    write_json(folder / f"{name}.json", {"name": name, **environment(), "rows": table, **more})
    print(f"written to {(folder / name).relative_to(ROOT)}.json")


def processed_scenes(home: Path, num_images: int, size: int = 256) -> Path:
    """A processed folder of drawn scenes, drawn once: `num_images` train images at size x size."""
    raw, processed = home / f"raw{num_images}", home / f"processed{num_images}_{size}"
    if not processed.is_dir():
        scenes.draw_dataset(raw, {"train": num_images, "val": 16}, (512, 256), seed=0)
        run_quietly([SCRIPT, "--data_dir", raw, "--output_dir", processed, "--size", size])
    return processed


def load(processed: Path, num_images: int) -> SegmentationSet:
    """Its training set, repeated to so many images."""
    loaded = load_split(processed, "train")
    rows = torch.arange(num_images) % len(loaded)
    facts = loaded.split, loaded.class_set, loaded.images[rows], loaded.masks[rows], loaded.num_pixels[rows.numpy()]
    return SegmentationSet(*facts, loaded.sha256)


def run_quietly(command: list) -> float:
    """Seconds that a command of Python takes. Raises CalledProcessError when it fails."""
    start = time.perf_counter()
    environment = os.environ | {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, env=environment)
    return time.perf_counter() - start
