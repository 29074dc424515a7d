"""Predictions for pictures, folders and videos: `python -m unetseg predict`."""

import csv
import io
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from .. import checkpoint
from ..classes import ClassSet, stored
from ..device import precision_rule
from ..files import atomic_open, exclusive, make_folder, write_json
from ..images import BadFile, overlay, read_photo
from ..inference import predict, trained_model, write_picture
from .video import frames_of, written_video

OUTPUT = ("ids", "colour", "overlay", "frames", "shares.csv", "shares.json")
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".heic", ".heif")
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".3gp")
MOST_SIDE = 32_767  # pixels that OpenCV resizes
UNLIKE = 0.32  # of `Unlikeness`, as a median: on the training data it is .17 to .25, on others .36 to .95


class Unlikeness:
    """How far the features of a picture are from those of the training data: the mean, over all channels of a network's
    BatchNorm layers, of |ln(variance in this picture / variance in training)|; 0 where they agree, or without such
    layers. After Schneider et al., NeurIPS 2020, who correct a network by these differences."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[float] = []
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(self.look)

    def look(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor], output: Tensor) -> None:
        variance = inputs[0].float().var(dim=(0, 2, 3)) + layer.eps
        self.found.append((variance / (layer.running_var + layer.eps)).log().abs().mean().item())

    def take(self) -> float:
        """The mean since the last call."""
        mean = statistics.fmean(self.found) if self.found else 0.0
        self.found.clear()
        return mean


class Predictor:
    """Trained weights, and how they are applied; see `inference.predict` for tiles and flip."""

    def __init__(self, run_or_weights: Path, precision: str = "auto", tiles: int = 1, flip: bool = False) -> None:
        self.model, about = trained_model(run_or_weights)
        device = next(self.model.parameters()).device
        self.class_set, self.size = stored(about), (about["width"], about["height"])
        self.how = {"precision": precision_rule(device) if precision == "auto" else precision}
        self.how |= {"tiles": tiles, "flip": flip}
        self.facts = self.class_set.facts() | {"void": about["void"], "size": self.size, **self.how}
        self.facts |= {"weights": str(run_or_weights), "weights_sha256": checkpoint.weights_sha256(run_or_weights)}
        self.unlikeness = Unlikeness(self.model)

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, dict]:
        """Class ids (H, W) uint8 of an RGB image (H, W, 3) uint8, and a row: its size, unlikeness, class shares."""
        pred = predict(self.model, image, self.size, **self.how)
        shares = np.bincount(pred.ravel(), minlength=len(self.class_set)) / pred.size
        row = {"width": image.shape[1], "height": image.shape[0], "unlike": round(self.unlikeness.take(), 3)}
        return pred, row | dict(zip(self.class_set.names, shares.round(6).tolist()))


def predict_files(predictor: Predictor, inputs: list[Path], out: Path) -> tuple[dict[str, dict], list[str]]:
    """Predict pictures, videos and folders of them; returns a row for each that was written, by the name of its file,
    and a message for each file that was left out.

    Of a picture: out/ids/<name>.png (class ids), out/colour/<name>.png at its own size, out/overlay/<name>.jpg with a
    legend below. Of a video: out/overlay/<name>.mp4 and out/frames/<name>.csv, a row per frame. Of all: shares.csv and
    shares.json, where a video has the means over its frames. Sub-folders are kept.
    """
    files, problems = find_files(inputs, out)
    rows: dict[str, dict] = {}
    with exclusive(out, wait=True), ThreadPoolExecutor(3) as pool:
        writing: list[Future] = []  # the files of the picture before; no more are kept in memory
        try:
            for path, name in tqdm(files.items(), unit="file", delay=1):
                try:
                    if path.suffix.lower() in VIDEOS:
                        rows[str(path)] = predict_video(predictor, path, out, name)
                        continue
                    image = read_photo(path)
                    if max(image.shape) > MOST_SIDE:
                        raise BadFile(f"{path}: expected sides of at most {MOST_SIDE} pixels, found {max(image.shape)}")
                    pred, row = predictor(image)
                except (BadFile, MemoryError) as error:
                    problems.append(str(error) if isinstance(error, BadFile) else f"{path}: needs more memory")
                    continue
                finish(writing)
                writing = write_pictures(pool, predictor.class_set, image, pred, row, out, name)
                rows[str(path)] = row
            finish(writing)
        finally:
            if rows:
                write_shares(rows, predictor.facts | {"left_out": problems}, out)
    return rows, problems


def write_pictures(
    pool: ThreadPoolExecutor, class_set: ClassSet, image: np.ndarray, pred: np.ndarray, row: dict, out: Path, name: str
) -> list[Future]:
    """Start writing what a picture's prediction is shown as."""
    for kind in ("ids", "colour", "overlay"):
        make_folder((out / kind / name).parent)
    painted = class_set.paint(pred)
    shown = np.vstack([overlay(image, painted), legend(class_set, image.shape[1], row)])
    pictures = {f"ids/{name}.png": pred, f"colour/{name}.png": painted, f"overlay/{name}.jpg": shown}
    return [pool.submit(write_picture, out / place, picture) for place, picture in pictures.items()]


def predict_video(predictor: Predictor, path: Path, out: Path, name: str) -> dict:
    """Predict a video frame by frame; returns a row with the means. Raises BadFile when it ends early."""
    for kind in ("overlay", "frames"):
        make_folder((out / kind / name).parent)
    fps, frames = frames_of(path)
    totals, count = Counter(), 0
    with (
        atomic_open(out / "frames" / f"{name}.csv") as file,
        written_video(out / "overlay" / f"{name}.mp4", fps) as write,
    ):
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        for count, image in enumerate(frames, 1):
            pred, row = predictor(image)
            if count == 1:
                table = csv.DictWriter(text, ["seconds", *row])
                table.writeheader()
                strip = legend(predictor.class_set, image.shape[1])
            write(np.vstack([overlay(image, predictor.class_set.paint(pred)), strip]))
            table.writerow({"seconds": round((count - 1) / fps, 3), **row})
            totals.update(row)
        text.detach()
    return {
        key: value // count if key in ("width", "height") else round(value / count, 6) for key, value in totals.items()
    }


def find_files(inputs: list[Path], out: Path) -> tuple[dict[Path, str], list[str]]:
    """Pictures and videos, each with a name for its results, and a message for each other file and empty folder.

    The name is the path below the folder that all inputs share, without its suffix unless another file has it, too.
    Links are followed; hidden files and folders, and what was written to `out` earlier, are passed over.
    """
    found, problems, own = [], [], {os.path.realpath(out / name) for name in OUTPUT}
    roots = [os.path.abspath(given if given.is_dir() else given.parent) for given in inputs]
    for given in inputs:
        paths = list(walk(given, own)) if given.is_dir() else [given]
        known = {path: 0 for path in paths if path == given or path.suffix.lower() in PICTURES + VIDEOS}
        problems += [
            f"{path}: expected a picture or a video, by its suffix" for path in paths if path not in set(known)
        ]
        if not known or not given.exists():
            problems.append(f"{given}: expected a picture, a video or a folder of them, found none")
        else:
            found += known
    found = list(dict.fromkeys(found))
    stems = {path: Path(os.path.relpath(path, os.path.commonpath(roots))).with_suffix("") for path in found}
    shared = Counter(stems.values())
    names = {path: stem if shared[stem] == 1 else stem.with_name(path.name) for path, stem in stems.items()}
    return {path: str(name) for path, name in names.items()}, problems


def walk(folder: Path, own: set[str]) -> Iterator[Path]:
    """The files below a folder, in order. Of folders that link to each other, each is entered once."""
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in own:
            folders.clear()
            continue
        own = own | {real}
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(place, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if os.path.realpath(path) not in own)


def legend(class_set: ClassSet, width: int, row: dict | None = None) -> np.ndarray:
    """A white strip (h, width, 3) uint8, h even, with the classes' colours and names, and their shares in a row."""
    side = max(10, width // 50)
    font, strip = ImageFont.load_default(side), Image.new("RGB", (width, 2 * side * (len(class_set) + 1)), "white")
    draw, x, y = ImageDraw.Draw(strip), side // 2, side // 2
    for name, colour in zip(class_set.names, class_set.colours.tolist()):
        if row is not None and row[name] == 0:
            continue
        text = name if row is None else f"{name} {100 * row[name]:.1f} %"
        length = 2 * side + int(draw.textlength(text, font))
        if x > side // 2 and x + length > width:
            x, y = side // 2, y + 3 * side // 2
        draw.rectangle((x, y, x + side, y + side), tuple(colour), "black")
        draw.text((x + 3 * side // 2, y + side), text, "black", font, anchor="ls")
        x += length + side
    return np.asarray(strip)[: (y + 2 * side) // 2 * 2]


def write_shares(rows: dict[str, dict], facts: dict, out: Path) -> None:
    """Write shares.csv and shares.json."""
    with atomic_open(out / "shares.csv") as file:
        text = io.TextIOWrapper(file, "utf-8", newline="", errors="surrogateescape", write_through=True)
        table = csv.DictWriter(text, ["file", *next(iter(rows.values()))])
        table.writeheader()
        table.writerows({"file": name, **row} for name, row in rows.items())
        text.detach()
    write_json(out / "shares.json", facts | {"files": rows})


def remarks(predictor: Predictor, rows: Iterable[dict]) -> list[str]:
    """What to know about pictures that are unlike those the weights were trained on."""
    rows, said, (width, height) = list(rows), [], predictor.size
    median = statistics.median(row["unlike"] for row in rows) if rows else 0
    if median > UNLIKE:
        said.append(
            f"these pictures look unlike the training data (median {median:.2f}, above {UNLIKE}): expect more errors"
        )
    small = sum(row["width"] < width / 2 or row["height"] < height / 2 for row in rows)
    if small:
        said.append(f"{small} of {len(rows)} have less than half of the {width}x{height} pixels of training")
    usual = width / height if width != height else 1.6  # square training images are mostly squeezed from wider ones
    odd = sum(not 0.5 <= row["width"] / row["height"] / usual <= 2 for row in rows)
    if odd:
        said.append(f"{odd} of {len(rows)} are far wider or narrower than street scenes are: crop them, or use --tiles")
    return said


def finish(writing: list[Future]) -> None:
    """Wait for the files of a picture. Raises FileError when one could not be written."""
    for future in writing:
        future.result()
