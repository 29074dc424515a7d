"""Two plots: what an image costs, by the number of images (100 to 10 000) and by their area (128² to 1024²).

    python benchmarks/scaling.py [--home FOLDER] [--most 10000]

Writes benchmarks/results/scaling.json, scaling_count.svg and scaling_area.svg. A cost that is linear is a level line.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from measure import RESULTS, SCRIPT, Contender, environment, processed_scenes, run_quietly
from start import repeat_pairs
from unetseg.trainer import Trainer

from unetseg import device, inference, plots
from unetseg.augment import basic
from unetseg.data import Batches, load_split
from unetseg.files import write_json
from unetseg.losses import cross_entropy
from unetseg.model import UNet

REPEATS = 3
SIDES = (128, 192, 256, 384, 512, 768, 1024)


def repeat_raw(source: Path, target: Path, number: int) -> Path:
    """A raw Cityscapes folder of `number` training frames, copies of the source's."""
    if not target.is_dir():
        for part, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            paths = sorted((source / part / "train").rglob(f"*_{ending}.png"))
            folder = target / part / "train" / "city"
            folder.mkdir(parents=True)
            for place in range(number):
                shutil.copyfile(paths[place % len(paths)], folder / f"city_{place:06d}_000019_{ending}.png")
    return target


def by_count(home: Path, most: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of preprocessing, reading, and an epoch of batches with augmentation, by the number of images."""
    found: dict[str, dict[int, list[float]]] = {"preprocessing": {}, "reading": {}, "batches of an epoch": {}}
    source = processed_scenes(home, 64, 64)
    counts = [count for count in (100, 300, 1000, 3000, 10_000) if count <= most]
    for count in counts:
        raw, processed = repeat_raw(home / "raw64", home / f"raw_count{count}", count), home / f"count{count}"
        repeat_pairs(source, processed, count)
        command = [SCRIPT, "--data_dir", raw, "--output_dir", home / "count_out", "--size", 64, "--splits", "train"]
        for _ in range(REPEATS if count < 10_000 else 2):
            shutil.rmtree(home / "count_out", ignore_errors=True)
            found["preprocessing"].setdefault(count, []).append(run_quietly(command))
            start = time.perf_counter()
            loaded = load_split(processed, "train")
            found["reading"].setdefault(count, []).append(time.perf_counter() - start)
            batches = Batches(loaded, 8, device.pick_device(), augment=lambda i, m, rows, _: basic(i, m, rows))
            start = time.perf_counter()
            assert sum(len(images) for images, _ in batches.epoch(1)) == count
            found["batches of an epoch"].setdefault(count, []).append(time.perf_counter() - start)
        print(count, {name: round(statistics.median(times[count]), 2) for name, times in found.items()}, flush=True)
    return found


def at_side(kind: str, side: int) -> Callable[[], None]:
    """A training step (two images) or a prediction (one) of the default preset at side x side."""
    model = UNet(7).to(device.pick_device())
    chosen = device.choose(model, (256, 256), compiled="no")
    trainer = Trainer(model, 10**6, 1e-3, 0.01, chosen.precision, chosen.memory_format)
    if kind == "prediction":
        image = (torch.rand(side, side, 3) * 255).to(torch.uint8).numpy()
        model.eval()
        return lambda: inference.predict(model, image, (side, side), chosen.precision)
    images, masks = torch.rand(2, 3, side, side), torch.randint(0, 7, (2, side, side))
    images, masks = images.to(trainer.device), masks.to(trainer.device)
    return lambda: trainer.step(images, masks, cross_entropy)[0].item()


def by_area(most: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of a training step and of a prediction, by pixels."""
    found: dict[str, dict[int, list[float]]] = {"training step": {}, "prediction": {}}
    for side in (side for side in SIDES if side <= most):
        for kind, times in found.items():
            with Contender(at_side, kind, side) as contender:
                times[side**2] = [contender.run()[0] for _ in range(REPEATS)]
        print(side, {name: round(statistics.median(times[side**2]), 3) for name, times in found.items()}, flush=True)
    return found


def draw(found: dict[str, dict[int, list[float]]], across: str, unit: str, factor: float) -> Figure:
    """Cost per image or pixel with its range; relative to the largest, so that a level line is a linear cost."""
    figure = Figure(figsize=(plots.WIDTH, 3.6), layout="constrained")
    ax = figure.subplots()
    for colour, (name, times) in zip(plots.STAGE_COLOURS, found.items()):
        costs = {size: [factor * value / size for value in values] for size, values in times.items()}
        middle = {size: statistics.median(values) for size, values in costs.items()}
        last = middle[max(middle)]
        label = f"{name} ({last:.3g} {unit})"
        ax.plot(list(middle), [value / last for value in middle.values()], "o-", color=colour, label=label)
        low, high = ([pick(values) / last for values in costs.values()] for pick in (min, max))
        ax.fill_between(list(middle), low, high, color=colour, alpha=0.2)
    ax.set(xscale="log", xlabel=across, ylabel="cost, relative to the largest", ylim=(0, None))
    ax.axhline(1, color="0.5", linewidth=0.8)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    parser.add_argument("--most", type=int, default=10_000, help="images (10000)")
    parser.add_argument("--side", type=int, default=1024, help="the largest (1024)")
    args = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "unetseg"
    area, count = by_area(args.side), by_count(args.home, args.most)
    write_json(RESULTS / "scaling.json", {"name": "scaling", **environment(), "by_count": count, "by_area": area})
    plots.save(draw(count, "images", "ms an image", 1e3), RESULTS / "scaling_count.svg")
    plots.save(draw(area, "pixels of an image", "µs a pixel", 1e6), RESULTS / "scaling_area.svg")


if __name__ == "__main__":
    main()
