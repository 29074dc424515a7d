"""The preprocessing script against decoding the same PNG files alone, and against the straightforward script.

    python benchmarks/preprocessing.py [--frames 300] [--home FOLDER]

On the real frames of the shared data (drawn ones of the same size where there are none), repeated. Both commands start
from nothing: interpreter, imports, worker processes. Writes benchmarks/results/preprocessing.json.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "preprocessing" / "image_segmentation_preprocessing.py"
FEW, SLOW_FRAMES = 24, 12  # the straightforward script takes a quarter of a second for each


def decode_opencv(path: str) -> None:
    import cv2

    cv2.setNumThreads(1)
    cv2.imread(path, cv2.IMREAD_UNCHANGED)


def decode_opencv_rgb(path: str) -> None:
    import cv2

    cv2.setNumThreads(1)
    cv2.imread(path, cv2.IMREAD_COLOR_RGB if "leftImg8bit" in path else cv2.IMREAD_GRAYSCALE)


def decode_pillow(path: str) -> None:
    from PIL import Image

    Image.open(path).load()


def decode_torchvision(path: str) -> None:
    import torch
    from torchvision.io import decode_png, read_file

    torch.set_num_threads(1)
    decode_png(read_file(path))


DECODERS = {f.__name__: f for f in (decode_opencv, decode_opencv_rgb, decode_pillow, decode_torchvision)}


def decode_all(raw: Path, decoder: str) -> None:
    """Decode every PNG on all cores; prints the seconds after the workers have started."""
    paths = [str(path) for path in sorted(raw.rglob("*.png"))]
    workers = os.cpu_count()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(DECODERS[decoder], paths[: 4 * workers], chunksize=1))
        start = time.perf_counter()
        list(pool.map(DECODERS[decoder], paths[4 * workers :], chunksize=4))
        print((time.perf_counter() - start) * len(paths) / (len(paths) - 4 * workers))


def straightforward(raw: Path, out: Path, frames: int) -> None:
    """What such scripts usually do: one process, Pillow, a comparison per label id, full-size copies, float64."""
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(ROOT))
    from unetseg.classes import CLASS_SETS

    class_set = CLASS_SETS["cityscapes7"]
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((raw / "leftImg8bit").rglob("*.png"))[:frames]:
        labels = Path(str(path).replace("leftImg8bit", "gtFine"))
        labels = labels.with_name(labels.name.replace("_gtFine.png", "_gtFine_labelIds.png"))
        image = np.array(Image.open(path)).astype(np.float64) / 255.0
        ids = np.array(Image.open(labels)).astype(np.float64)
        assert set(np.unique(ids)) <= set(range(34)), f"{labels}: unknown ids"
        mask = np.full(ids.shape, 255.0)
        for label_id in range(34):
            mask = np.where(ids == label_id, float(class_set.lookup[label_id]), mask)
        pixels = [int(np.sum(mask == value)) for value in (*range(len(class_set)), 255)]
        small = Image.fromarray((image * 255).astype(np.uint8)).resize((256, 256), Image.Resampling.BOX)
        np.save(out / f"{path.stem}.npy", np.array(small).astype(np.float64) / 255.0)
        small = Image.fromarray(mask.astype(np.uint8)).resize((256, 256), Image.Resampling.NEAREST)
        small.save(out / f"{path.stem}.png")
        assert sum(pixels) == mask.size


def repeat_frames(raw: Path, frames: int) -> str:
    """Fill `raw` with so many frames in the Cityscapes layout, copies of the real ones; returns where they are from."""
    from measure import SHARED

    sample, kind = SHARED / "cityscapes_sample", "8 real frames, repeated"
    if not sample.is_dir():
        from unetseg import scenes

        sample, kind = raw.with_name("drawn"), "8 drawn frames, repeated"
        scenes.draw_dataset(sample, {"train": 8, "val": 1}, (2048, 1024), seed=0)
    images = sorted((sample / "leftImg8bit").rglob("*_leftImg8bit.png"))[:8]
    for number in range(frames):
        image = images[number % len(images)]
        stem = f"city_{number:06d}_000019"
        labels = Path(str(image).replace("leftImg8bit", "gtFine")).with_name(
            image.name.replace("_leftImg8bit", "_gtFine_labelIds")
        )
        for source, part, ending in ((image, "leftImg8bit", "leftImg8bit"), (labels, "gtFine", "gtFine_labelIds")):
            target = raw / part / "train" / "city" / f"{stem}_{ending}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return kind


def ours(raw: Path, out: Path, *more: str) -> tuple[float, float]:
    """Seconds of the script into an empty folder, and the most memory that one of its workers had, in MiB."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(SCRIPT), "--data_dir", str(raw), "--output_dir", str(out), "--log_level", "ERROR"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *more], env=os.environ | {"TQDM_DISABLE": "1"})
    peaks = [0.0]
    watcher = threading.Thread(target=_watch_workers, args=(process, peaks))
    watcher.start()
    if process.wait():
        raise SystemExit(f"failed: {command}")
    seconds = time.perf_counter() - start
    watcher.join()
    return seconds, max(peaks)


def _watch_workers(process: subprocess.Popen, peaks: list[float]) -> None:
    import psutil

    while process.poll() is None:
        try:
            for child in psutil.Process(process.pid).children():
                status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                peaks += [int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")]
        except (OSError, psutil.Error):  # one of them has just ended
            pass
        time.sleep(0.1)


def straightforward_seconds(raw: Path, out: Path) -> float:
    """Seconds of the straightforward script per frame, its start included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, "straightforward", str(raw), str(out)], check=True)
    return (time.perf_counter() - start) / SLOW_FRAMES


def limit(raw: Path, decoder: str) -> tuple[float, float]:
    """Seconds to decode alone, from the start of the interpreter and from that of the warm workers."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "decode", str(raw), decoder]
    inner = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - start, float(inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    args = parser.parse_args()
    from measure import REPEATS, Row, save

    raw, out = args.home / f"raw_frames{args.frames}", args.home / "frames_processed"
    kind = repeat_frames(raw, args.frames)
    few = args.home / f"raw_frames{FEW}"
    repeat_frames(few, FEW)
    seconds = {name: limit(few, name) for name in DECODERS}
    warm = min(seconds, key=lambda name: seconds[name][1])
    whole = min(seconds, key=lambda name: seconds[name][0] + (args.frames / FEW - 1) * seconds[name][1])
    print(f"decoding {FEW} frames: " + ", ".join(f"{n[7:]} {w:.2f} s, warm {v:.2f}" for n, (w, v) in seconds.items()))
    rounds, memory = [], {}
    for _ in range(REPEATS):
        (many_seconds, memory[args.frames]), (few_seconds, memory[FEW]) = ours(raw, out), ours(few, out)
        rounds.append(
            {
                "ours": many_seconds,
                "whole": limit(raw, whole)[0],
                "warm": limit(raw, warm)[1],
                "slow": straightforward_seconds(raw, args.home / "slow") * args.frames,
                "ours, few": few_seconds,
                "whole, few": limit(few, whole)[0],
            }
        )
    what = f"preprocessing {args.frames} frames of 2048x1024"
    against = f"a command that decodes them alone ({whole[7:]})"
    further = [(r["whole"] - r["whole, few"]) / (r["ours"] - r["ours, few"]) for r in rounds]
    seconds_of = {name: [r[name] for r in rounds] for name in rounds[0]}
    rows = [
        Row(what, against, "≥ 0.85", [r["whole"] / r["ours"] for r in rounds], seconds_of, {"frames": kind}),
        Row("each further frame", against, "≥ 0.85", further, notes={"frames": f"{FEW} to {args.frames}"}),
        Row(what, f"decoding alone ({warm[7:]}), workers warm", "≥ 0.85", [r["warm"] / r["ours"] for r in rounds]),
        Row(what, "the straightforward script", "≥ 20", [r["slow"] / r["ours"] for r in rounds]),
    ]
    print(*rows, sep="\n")
    print(f"memory of a worker: {memory[FEW]:.0f} MiB with {FEW} frames, {memory[args.frames]:.0f} with {args.frames}")
    facts = {"memory_mebibytes": memory, "repeats": REPEATS}
    save("preprocessing", rows, decoders=seconds, **facts)


if __name__ == "__main__":
    if sys.argv[1:2] == ["decode"]:
        decode_all(Path(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] == ["straightforward"]:
        straightforward(Path(sys.argv[2]), Path(sys.argv[3]), SLOW_FRAMES)
    else:
        main()
