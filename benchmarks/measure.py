"""What the benchmarks share: contenders in processes of their own, interleaved rounds, a table and a JSON file."""

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
from unetseg import run
from unetseg.data import SegmentationSet, load_split
from unetseg.device import device_name, pick_device
from unetseg.files import make_folder, write_json
from unetseg.tools import scenes

SHARED = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "benchmarks" / "results"
PRESETS = {"quick": (16, 4), "default": (32, 4), "published": (64, 3)}  # channels, depth
ROUNDS = 3


@dataclass
class Row:
    """One line of a table: the ratio (theirs / ours, in time) of each round, and the seconds of both."""

    what: str
    against: str
    ratios: list[float]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    notes: dict = field(default_factory=dict)

    def __str__(self) -> str:
        spread = f"{statistics.median(self.ratios):.2f} ({min(self.ratios):.2f}-{max(self.ratios):.2f})"
        return f"{self.what:<60} {self.against:<50} {spread:>19}  {self.notes}"


class Contender:
    """A step in a process of its own, set up once: `make(*args)` returns the function that `run` times."""

    def __init__(self, make: Callable, *args: object) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args))
        self.process.start()
        theirs.close()
        self.run()  # to warm up

    def run(self) -> float:
        """Seconds of one step."""
        self.pipe.send("go")
        return self.pipe.recv()

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
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pipe.send(time.perf_counter() - start)


def compare(what: str, against: str, ours: Callable, theirs: Callable, images: int = 0) -> Row:
    """Run both in turn, ROUNDS times; each gives its seconds. images: that our step processes, for images/s."""
    rounds = [(ours(), theirs()) for _ in range(ROUNDS)]
    seconds = {"ours": [a for a, _ in rounds], "theirs": [b for _, b in rounds]}
    notes = {"images_per_second": round(images / statistics.median(seconds["ours"]), 2)} if images else {}
    row = Row(what, against, [b / a for a, b in rounds], seconds, notes)
    print(row, flush=True)
    return row


def compare_processes(what: str, against: str, ours: tuple, theirs: tuple, images: int = 0) -> Row:
    """`compare` for two Contenders, given as (make, *arguments)."""
    with Contender(*ours) as a, Contender(*theirs) as b:
        return compare(what, against, a.run, b.run, images)


def environment() -> dict:
    """What the figures hold for; the results of other benchmarks do not make the commit dirty."""
    where = ("--", ".", ":!benchmarks/results", ":!README.md")
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "-uno", *where]
    changed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    commit = run.commit() if changed else run.commit().removesuffix("-dirty")
    facts = {"device": device_name(pick_device()), "cores": os.cpu_count(), "python": platform.python_version()}
    return facts | {"torch": str(torch.__version__), "opencv": cv2.__version__, "commit": commit}


def save(name: str, rows: list[Row]) -> None:
    """Write RESULTS/<name>.json."""
    write_json(RESULTS / f"{name}.json", {"name": name, **environment(), "rows": [asdict(row) for row in rows]})


def processed_scenes(home: Path, size: int = 256) -> Path:
    """A processed folder of 64 drawn train scenes at size x size, made once."""
    raw, processed = home / "raw", home / f"processed{size}"
    if not (processed / "stats_val.json").is_file():
        scenes.draw_dataset(make_folder(raw), {"train": 64, "val": 16}, (512, 256), seed=0)
        quietly("preprocess", "--data-dir", raw, "--output-dir", processed, "--size", size)
    return processed


def load(home: Path, num_images: int) -> SegmentationSet:
    """Its training set, repeated or cut to so many images."""
    loaded = load_split(processed_scenes(home), "train")
    rows = torch.arange(num_images) % len(loaded)
    facts = loaded.images[rows], loaded.masks[rows], loaded.num_pixels[rows.numpy()]
    return SegmentationSet(loaded.split, loaded.class_set, *facts)


def quietly(*command: object) -> float:
    """Seconds that `python -m unetseg` takes with these arguments. Raises CalledProcessError when it fails."""
    start = time.perf_counter()
    variables = {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    parts = [sys.executable, "-m", "unetseg", *map(str, command)]
    subprocess.run(parts, check=True, capture_output=True, env=os.environ | variables)
    return time.perf_counter() - start
