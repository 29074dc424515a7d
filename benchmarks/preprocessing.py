"""Preprocessing of frames of 2048x1024 against decoding alone and against the straightforward script.

    python benchmarks/preprocessing.py [--frames 100] [--home FOLDER]

The frames are real where they lie in SHARED_DATA, else drawn. Writes benchmarks/results/preprocessing.json.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from measure import SHARED, Row, compare, quietly, save
from PIL import Image

from unetseg.classes import CLASS_SETS
from unetseg.tools import scenes

SLOW_FRAMES = 12  # the straightforward script takes a quarter of a second for each


def decode(path: str) -> None:
    cv2.setNumThreads(1)
    cv2.imread(path, cv2.IMREAD_UNCHANGED)


def decode_all(raw: Path) -> float:
    """Seconds to decode every PNG on all cores, workers warm."""
    paths, workers = [str(path) for path in sorted(raw.rglob("*.png"))], os.cpu_count()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(decode, paths[: 4 * workers], chunksize=1))
        start = time.perf_counter()
        list(pool.map(decode, paths, chunksize=4))
        return time.perf_counter() - start


def straightforward(raw: Path, out: Path, frames: int) -> float:
    """What such scripts usually do: one process, Pillow, a comparison per label id, full-size copies, float64."""
    class_set, start = CLASS_SETS["cityscapes7"], time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((raw / "leftImg8bit").rglob("*.png"))[:SLOW_FRAMES]:
        labels = str(path).replace("leftImg8bit", "gtFine").replace("_gtFine.png", "_gtFine_labelIds.png")
        image = np.array(Image.open(path)).astype(np.float64) / 255.0
        ids = np.array(Image.open(labels)).astype(np.float64)
        assert set(np.unique(ids)) <= set(range(34)), f"{labels}: unknown ids"
        mask = np.full(ids.shape, 255.0)
        for label_id in range(34):
            mask = np.where(ids == label_id, float(class_set.lookup[label_id]), mask)
        assert sum(int(np.sum(mask == value)) for value in (*range(len(class_set)), 255)) == mask.size
        small = Image.fromarray((image * 255).astype(np.uint8)).resize((256, 256), Image.Resampling.BOX)
        np.save(out / f"{path.stem}.npy", np.array(small).astype(np.float64) / 255.0)
        Image.fromarray(mask.astype(np.uint8)).resize((256, 256), Image.Resampling.NEAREST).save(
            out / f"{path.stem}.png"
        )
    return (time.perf_counter() - start) / SLOW_FRAMES * frames


def repeat_frames(raw: Path, frames: int) -> None:
    """Fill `raw` with so many frames in the Cityscapes layout, copies of eight."""
    sample = SHARED / "cityscapes_sample"
    if not sample.is_dir():
        sample = raw.with_name("drawn")
        scenes.draw_dataset(sample, {"train": 8, "val": 1}, (2048, 1024), seed=0)
    images = sorted((sample / "leftImg8bit").rglob("*_leftImg8bit.png"))[:8]
    for number in range(frames):
        image = images[number % len(images)]
        labels = str(image).replace("_leftImg8bit", "_gtFine_labelIds").replace("leftImg8bit", "gtFine")
        for source, part, ending in ((image, "leftImg8bit", "leftImg8bit"), (labels, "gtFine", "gtFine_labelIds")):
            target = raw / part / "train" / "city" / f"city_{number:06d}_000019_{ending}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def measure(home: Path, frames: int) -> list[Row]:
    raw, out = home / f"frames{frames}", home / "frames_processed"
    repeat_frames(raw, frames)

    def ours() -> float:
        shutil.rmtree(out, ignore_errors=True)
        return quietly("preprocess", "--data-dir", raw, "--output-dir", out)

    against: dict[str, Callable[[], float]] = {
        "decoding alone (OpenCV), workers warm": lambda: decode_all(raw),
        "the straightforward script": lambda: straightforward(raw, home / "slow", frames),
    }
    what = f"preprocessing {frames} frames of 2048x1024"
    rows = [compare(what, name, ours, theirs, frames) for name, theirs in against.items()]
    again = lambda: quietly("preprocess", "--data-dir", raw, "--output-dir", out)  # noqa: E731
    return [*rows, compare("a rerun that finds everything made", "making it", again, ours, frames)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    args = parser.parse_args()
    save("preprocessing", measure(args.home, args.frames))
    return 0


if __name__ == "__main__":
    sys.exit(main())
