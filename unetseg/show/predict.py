"""Predictions for pictures, folders and videos: `python -m unetseg predict`."""

import csv
import io
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from .. import checkpoint
from ..classes import ClassSet, stored
from ..device import out_of_memory, precision_rule
from ..files import exclusive, make_folder, write_bytes, write_json
from ..images import BadFile, overlay, read_photo
from ..inference import predict, trained_model, write_picture
from .video import frames_of, written_video

OUTPUT = ("ids", "colour", "overlay", "frames", "shares.csv", "shares.json")
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".heic", ".heif")
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".3gp")
MOST_SIDE = 32_767  # pixels that OpenCV resizes
UNLIKE = 0.32  # mean of `watch_features`, as a median: on the training data it is .17 to .25, on others .36 to .95


def watch_features(model: nn.Module) -> list[float]:
    """A list to which each BatchNorm layer adds, in each pass, how far its features are from the training data's: the
    mean over its channels of |ln(variance in this picture / variance in training)|, 0 where they agree. After Schneider
    et al., NeurIPS 2020, who correct a network by these differences."""
    found: list[float] = []

    def look(layer: nn.BatchNorm2d, inputs: tuple[Tensor], output: Tensor) -> None:
        variance = inputs[0].float().var(dim=(0, 2, 3), correction=0) + layer.eps
        found.append((variance / (layer.running_var + layer.eps)).log().abs().mean().item())

    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(look)
    return found


class Predictor:
    """Trained weights, and how they are applied; see `inference.predict` for tiles and flip."""

    def __init__(self, run_or_weights: Path, precision: str = "auto", tiles: int = 1, flip: bool = False) -> None:
        self.model, about = trained_model(run_or_weights)
        precision = precision_rule(next(self.model.parameters()).device) if precision == "auto" else precision
        self.class_set, self.size = stored(about), (about["width"], about["height"])
        self.how = {"precision": precision, "tiles": tiles, "flip": flip}
        self.facts = self.class_set.facts() | {"void": about["void"], "size": self.size, **self.how}
        self.facts |= {"weights": str(run_or_weights), "weights_sha256": checkpoint.weights_sha256(run_or_weights)}
        self.unlike = watch_features(self.model)

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, dict]:
        """Class ids (H, W) uint8 of an RGB image (H, W, 3) uint8, and its width, height, unlikeness, shares (C,)."""
        self.unlike.clear()
        pred = predict(self.model, image, self.size, **self.how)
        shares = np.bincount(pred.ravel(), minlength=len(self.class_set)) / pred.size
        found = {"unlike": statistics.fmean(self.unlike or [0.0]), "shares": shares.tolist()}
        return pred, {"width": pred.shape[1], "height": pred.shape[0], **found}


def predict_files(predictor: Predictor, inputs: list[Path], out: Path) -> tuple[dict[str, dict], list[str]]:
    """Predict pictures, videos and folders of them. Returns what `Predictor` says of each, by the path of the file, and
    a message for each file that was left out.

    Of a picture: out/ids/<name>.png (class ids), out/colour/<name>.png at its own size, out/overlay/<name>.jpg with a
    legend below. Of a video: out/overlay/<name>.mp4 and out/frames/<name>.csv, a row per frame. Of all: shares.csv and
    shares.json, where a video has the means over its frames. Sub-folders are kept.
    """
    files, problems = find_files(inputs, out)
    rows: dict[str, dict] = {}
    with exclusive(out, wait=True):
        try:
            for path, name in tqdm(files.items(), unit="file", delay=1):
                predict_one = predict_video if path.suffix.lower() in VIDEOS else predict_picture
                try:
                    rows[str(path)] = predict_one(predictor, path, out, name)
                except BadFile as error:
                    problems.append(str(error))
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    problems.append(f"{path}: needs more memory than there is; make it smaller, or use fewer --tiles")
        finally:  # also when it is stopped: what was written is listed
            if rows:
                write_table(out / "shares.csv", "file", predictor.class_set, rows)
                write_json(out / "shares.json", predictor.facts | {"files": rows, "left_out": problems})
    return rows, problems


def predict_picture(predictor: Predictor, path: Path, out: Path, name: str) -> dict:
    """Write what is made of one picture. Raises BadFile."""
    image = read_photo(path)
    if max(image.shape) > MOST_SIDE:
        raise BadFile(f"{path}: expected sides of at most {MOST_SIDE} pixels, found {max(image.shape)}")
    pred, row = predictor(image)
    painted = predictor.class_set.paint(pred)
    shown = np.vstack([overlay(image, painted), legend(predictor.class_set, image.shape[1], row["shares"])])
    pictures = {f"ids/{name}.png": pred, f"colour/{name}.png": painted, f"overlay/{name}.jpg": shown}
    with ThreadPoolExecutor(len(pictures)) as pool:
        list(pool.map(write_picture, (out / place for place in pictures), pictures.values()))
    return row


def predict_video(predictor: Predictor, path: Path, out: Path, name: str) -> dict:
    """Write what is made of a video, frame by frame; returns the means. Raises BadFile when it ends early."""
    fps, frames = frames_of(path)
    rows: dict[float, dict] = {}
    strip = None
    with written_video(make_folder((out / "overlay" / name).parent) / f"{Path(name).name}.mp4", fps) as write:
        for number, image in enumerate(frames):
            pred, rows[round(number / fps, 3)] = predictor(image)
            strip = legend(predictor.class_set, image.shape[1]) if strip is None else strip
            write(np.vstack([overlay(image, predictor.class_set.paint(pred)), strip]))
    write_table(out / "frames" / f"{name}.csv", "seconds", predictor.class_set, rows)
    means = {"unlike": statistics.fmean(row["unlike"] for row in rows.values())}
    means["shares"] = np.mean([row["shares"] for row in rows.values()], axis=0).tolist()
    return rows[0.0] | means | {"frames": len(rows)}


def find_files(inputs: list[Path], out: Path) -> tuple[dict[Path, str], list[str]]:
    """Pictures and videos, each with a name for its results, and a message for each file that is neither.

    A name is the path below the folder that holds all inputs, without its suffix unless another file needs the same
    name. Links are followed; hidden files and folders, and what was written to `out` earlier, are passed over.
    """
    own = {os.path.realpath(out / name) for name in OUTPUT} if (out / "shares.json").is_file() else set()
    found: dict[str, Path] = {}  # each file once
    roots, problems = [], []
    for given in inputs:
        folder = os.path.isdir(given)
        paths = list(walk(given, own, problems)) if folder else [given] if os.path.isfile(given) else []
        known = [path for path in paths if path == given or path.suffix.lower() in PICTURES + VIDEOS]
        problems += [f"{path}: expected a picture or a video, by its suffix" for path in paths if path not in known]
        if known:
            roots.append(os.path.abspath(given if folder else given.parent))
            found |= {os.path.abspath(path): path for path in known if os.path.abspath(path) not in found}
        else:
            problems.append(f"{given}: expected a picture, a video or a folder of them, found none")
    full = {path: Path(os.path.relpath(place, os.path.commonpath(roots))) for place, path in found.items()}
    taken = Counter([name.with_suffix("") for name in full.values()]) + Counter(full.values())
    short = {path: name.with_suffix("") for path, name in full.items()}
    return {path: str(name if taken[name] == 1 else full[path]) for path, name in short.items()}, problems


def walk(folder: Path, own: set[str], problems: list[str]) -> Iterator[Path]:
    """The files below a folder, in order. Of folders that link to each other, each is entered once."""
    for place, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: problems.append(str(error))):
        real = os.path.realpath(place)
        if real in own:
            folders.clear()
            continue
        own = own | {real}
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(place, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if os.path.realpath(path) not in own)


def legend(class_set: ClassSet, width: int, shares: list[float] | None = None) -> np.ndarray:
    """A white strip (h, width, 3) uint8, h even, with the classes' colours and names; given their shares, with these,
    and without the classes that do not occur."""
    side = min(max(10, width // 50), 40)
    font, strip = ImageFont.load_default(side), Image.new("RGB", (width, 2 * side * (len(class_set) + 1)), "white")
    draw, x, y = ImageDraw.Draw(strip), side // 2, side // 2
    for class_id, (name, colour) in enumerate(zip(class_set.names, class_set.colours.tolist())):
        if shares and not shares[class_id]:
            continue
        text = f"{name} {100 * shares[class_id]:.1f} %" if shares else name
        length = 2 * side + int(draw.textlength(text, font))
        if x > side // 2 and x + length > width:
            x, y = side // 2, y + 3 * side // 2
        draw.rectangle((x, y, x + side, y + side), tuple(colour), "black")
        draw.text((x + 3 * side // 2, y + side), text, "black", font, anchor="ls")
        x += length + side
    return np.asarray(strip)[: (y + 2 * side) // 2 * 2]


def write_table(path: Path, key: str, class_set: ClassSet, rows: dict) -> None:
    """Write a CSV file and its folder: the key of each row, its size, unlikeness, and share of each class."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow([key, "width", "height", "unlike", *class_set.names])
    for name, row in rows.items():
        numbers = [round(number, 6) for number in (row["unlike"], *row["shares"])]
        table.writerow([name, row["width"], row["height"], *numbers])
    write_bytes(make_folder(path.parent) / path.name, text.getvalue().encode(errors="surrogateescape"))


def remarks(predictor: Predictor, rows: Iterable[dict]) -> list[str]:
    """What to know about pictures that are unlike those the weights were trained on."""
    rows, said, (width, height) = list(rows), [], predictor.size
    median = statistics.median(row["unlike"] for row in rows) if rows else 0
    if median > UNLIKE:
        said.append(f"these pictures look unlike the training data ({median:.2f}, above {UNLIKE}): expect more errors")
    if small := sum(row["width"] < width / 2 or row["height"] < height / 2 for row in rows):
        said.append(f"{small} of {len(rows)} have less than half of the {width}x{height} pixels of training")
    usual = width / height if width != height else 1.6  # square training images are mostly squeezed from wider ones
    if odd := sum(not 0.5 <= row["width"] / row["height"] / usual <= 2 for row in rows):
        said.append(f"{odd} of {len(rows)} are far wider or narrower than street scenes are: crop them, or use --tiles")
    return said
