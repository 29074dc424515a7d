"""Evaluation, prediction and plain forward passes, each against the sum of what cannot be done without.

    python benchmarks/inference.py [--home FOLDER] [--large]

--large measures photographs' size and batches of 16, and folders of 100 and 1000 photographs, instead. Writes
benchmarks/results/inference.json or inference_large.json.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from measure import (
    PRESETS,
    REPEATS,
    SHARED,
    Row,
    compare,
    compare_processes,
    load,
    peak_memory,
    processed_scenes,
    save,
    settle,
)
from unetseg.trainer import forward

from unetseg import device, engine, inference, memory, pictures, scenes
from unetseg.classes import CLASS_SETS
from unetseg.data import Batches
from unetseg.losses import cross_entropy
from unetseg.model import UNet

SIZE, CLASSES = (256, 256), CLASS_SETS["cityscapes7"]
AGAINST = "decode + forward + encode, summed"


def network(preset: str = "default") -> torch.nn.Module:
    memory.keep_freed()
    torch.manual_seed(0)
    return UNet(7, *PRESETS[preset]).to(device.pick_device(), memory_format=torch.channels_last).eval()


def evaluation(home: Path) -> Callable[[], None]:
    """The scores of 32 images, as `evaluate` takes them."""
    model, dataset = network(), load(processed_scenes(home, 64), 32)
    batches = Batches(dataset, 8, device.pick_device())
    return lambda: engine.evaluate(model, batches.epoch(), 7, cross_entropy)


def forward_alone(home: Path) -> Callable[[], None]:
    """The same network's forward passes over as many batches of the same size."""
    model = network()
    images = torch.rand(8, 3, *SIZE, device=device.pick_device())

    def step() -> None:
        with torch.inference_mode():
            for _ in range(4):
                model(images)
        settle()

    return step


def passes(preset: str, plain: bool, batch: int, height: int, width: int) -> Callable[[], None]:
    """Forward passes: plain PyTorch in fp32, or as `predict` does them on this device."""
    torch.manual_seed(0)
    if plain:
        model, precision = UNet(7, *PRESETS[preset]).to(device.pick_device()).eval(), "fp32"
    else:
        model = network(preset)
        precision = device.choose(model, SIZE, training=False).precision
    images = torch.rand(batch, 3, height, width, device=device.pick_device())

    def step() -> None:
        with torch.inference_mode():
            forward(model, images, precision)
        settle()

    return step


class Photos:
    """A folder of photographs and the parts of predicting one: decoding, the forward pass, encoding three pictures."""

    def __init__(self, home: Path, number: int) -> None:
        real = sorted(SHARED.glob("cityscapes_sample/leftImg8bit/*/*/*.png"))
        if not real:
            scenes.draw_dataset(home / "drawn_photos", {"train": 8, "val": 1}, (2048, 1024), seed=0)
            real = sorted((home / "drawn_photos/leftImg8bit").rglob("*.png"))
        self.kind = f"real frames of {SHARED.name}" if SHARED in real[0].parents else "drawn frames"
        self.folder, self.out = home / f"photos{number}", home / f"predicted{number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in range(number):
            if not (self.folder / f"{place}.png").exists():
                os.symlink(real[place % len(real)].resolve(), self.folder / f"{place}.png")
        self.paths = sorted(self.folder.iterdir())
        self.model = network()
        self.precision = device.choose(self.model, SIZE, training=False).precision

    def whole(self) -> float:
        """Seconds from the files to the written overlays."""
        start = time.perf_counter()
        problems = inference.predict_each(self.model, self.paths, self.out, CLASSES, SIZE, self.precision)
        assert not problems
        return time.perf_counter() - start

    def parts(self) -> dict[str, float]:
        """Seconds of each part alone, on the first photograph."""
        image = pictures.read_photo(self.paths[0])
        small = torch.from_numpy(cv2.resize(image, SIZE)).to(device.pick_device()).permute(2, 0, 1)[None] / 255
        pred = inference.predict(self.model, image, SIZE, self.precision)
        painted = CLASSES.paint(pred)
        drawn = [pred, painted, pictures.overlay(image, painted)]
        kinds = {
            "decode": lambda: pictures.read_photo(self.paths[0]),
            "forward": lambda: (self._forward(small), settle()),
            "encode": lambda: [cv2.imencode(".png", picture) for picture in drawn],
        }
        seconds = {}
        for name, part in kinds.items():
            start = time.perf_counter()
            part()
            seconds[name] = time.perf_counter() - start
        return seconds

    def _forward(self, image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return forward(self.model, image, self.precision)


def predicting(home: Path, number: int) -> list[Row]:
    """One photograph, and a folder of them with its memory, against decoding + forward + encoding, summed."""
    one, many = Photos(home, 1), Photos(home, number)
    one.whole()
    facts = {"photographs": f"2048x1024, {one.kind}"}
    rows = [compare("predict, one photograph", AGAINST, "≤ 1.2", one.whole, lambda: sum(one.parts().values()), **facts)]
    rows[0].notes["parts"] = one.parts()
    peaks = [many.whole() and peak_memory()]

    def all_parts() -> float:
        return sum(sum(many.parts().values()) for _ in range(5)) / 5 * number

    rows.append(compare(f"predict, a folder of {number}", AGAINST, "≤ 1.2", many.whole, all_parts, **facts))
    peaks.append(peak_memory())
    rows[-1].notes["peak_mebibytes"] = {f"after {number}": peaks[0], f"after {6 * number}": peaks[1]}
    print(rows[-1].notes["peak_mebibytes"])
    return rows


def thousand(home: Path) -> Row:
    """A folder of 1000 photographs, predicted once; its memory after it and before."""
    photos = Photos(home, 1000)
    before, seconds = peak_memory(), photos.whole()
    parts = statistics.median(sum(photos.parts().values()) for _ in range(REPEATS)) * 1000
    peaks = {"before": before, "after": peak_memory()}
    row = Row("predict, a folder of 1000, once", AGAINST, "≤ 1.2", [seconds / parts], notes={"peak_mebibytes": peaks})
    print(row, peaks, flush=True)
    return row


def speeds(large: bool) -> list[Row]:
    """Images/s against plain PyTorch."""
    rows = []
    sizes = [(1, 512, 1024), (16, 256, 256), (16, 512, 1024)] if large else [(1, 256, 256)]
    for preset, (batch, height, width) in itertools.product(["default"], sizes):
        what = f"inference, {preset} preset, {height}x{width} (height x width), batch {batch}"
        ours, theirs = ((passes, preset, plain, batch, height, width) for plain in (False, True))
        rows.append(compare_processes(what, "plain PyTorch, fp32", "≥ 2", ours, theirs))
        for name, seconds in rows[-1].seconds.items():
            rows[-1].notes[f"images_per_second_{name}"] = batch / sorted(seconds)[len(seconds) // 2]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    processed_scenes(args.home, 64)
    if args.large:
        rows = [*speeds(True), *predicting(args.home, 100), thousand(args.home)]
    else:
        halves = (evaluation, args.home), (forward_alone, args.home)
        rows = [compare_processes("evaluation of a split, default preset", "forward passes alone", "≤ 1.1", *halves)]
        rows += speeds(False) + predicting(args.home, 8)
    save("inference_large" if args.large else "inference", rows)


if __name__ == "__main__":
    main()
