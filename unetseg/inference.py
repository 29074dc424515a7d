"""Trained weights at work: predictions for images of any size."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from . import checkpoint
from .classes import stored
from .data import Batches, SegmentationSet
from .device import pick_device, precision_rule
from .files import atomic_open, exclusive, make_folder
from .images import BadFile, cv2, overlay, read_photo, shrink
from .settings import Settings
from .train import forward

MOST_SIDE = 1_000_000  # pixels, as PNG files may have
OUTPUT = ("ids", "colour", "overlay")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def trained_model(run_or_weights: Path) -> tuple[nn.Module, dict]:
    """The trained network, ready to predict on the best device, and what it was trained with."""
    model, about = checkpoint.load_model(run_or_weights)
    return model.to(pick_device(), memory_format=torch.channels_last).eval(), about


def augmented(settings: Settings, train_set: SegmentationSet, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees: images (n, H, W, 3) uint8 and masks (n, H, W) uint8 of the first epoch."""
    images, masks, _ = next(Batches(train_set, count, torch.device("cpu"), settings).epoch(1))
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), masks.to(torch.uint8).numpy()


@torch.inference_mode()
def predictions(model: nn.Module, dataset: SegmentationSet, count: int, precision: str = "fp32") -> tuple:
    """Images (n, H, W, 3) uint8, masks and predictions (n, H, W) uint8 of up to `count` images, evenly spread."""
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long()
    images, masks = dataset.batch(places, next(model.parameters()).device)
    preds = forward(model.eval(), images, precision).argmax(dim=1)
    shown = (images * 255).round().permute(0, 2, 3, 1), masks, preds
    return tuple(tensor.to("cpu", torch.uint8).numpy() for tensor in shown)


@torch.inference_mode()
def predict(model: nn.Module, image: np.ndarray, size: tuple[int, int], precision: str = "fp32") -> np.ndarray:
    """Class ids (H, W) uint8 for an RGB image (H, W, 3) uint8 of any size.

    size  width and height that the model was trained at: the image is brought there by area averaging, and the logits,
          not the classes, are brought back
    """
    small = torch.from_numpy(shrink(image, size)).to(next(model.parameters()).device)
    logits = forward(model, small.permute(2, 0, 1)[None] / 255, precision)[0].cpu().numpy()
    highest, pred = None, np.zeros(image.shape[:2], np.uint8)
    for class_id, logit in enumerate(logits):  # one by one: all classes at full size would take 28 bytes a pixel
        large = cv2.resize(logit, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        highest = large if highest is None else highest
        wins = cv2.compare(large, highest, cv2.CMP_GT)  # 255 where true
        cv2.max(pred, cv2.min(wins, class_id), pred)
        cv2.max(large, highest, highest)
    return pred


def predict_files(
    run_or_weights: Path, inputs: list[Path], out: Path, precision: str = "auto"
) -> tuple[int, list[str]]:
    """Predict images and folders of images; returns how many were written, and a message for each that was not.

    Writes out/ids/<stem>.png (class ids), out/colour/<stem>.png and out/overlay/<stem>.png at the input's own size.
    """
    model, about = trained_model(run_or_weights)
    class_set, size = stored(about), (about["width"], about["height"])
    precision = precision_rule(next(model.parameters()).device) if precision == "auto" else precision
    paths, problems = find_images(inputs, out)
    written, writing = 0, []  # the files of the image before; no more are kept in memory
    with exclusive(out, wait=True), ThreadPoolExecutor(len(OUTPUT)) as pool:
        for folder in OUTPUT:
            make_folder(out / folder)
        for path in tqdm(paths, unit="img", delay=1):
            try:
                image = read_photo(path)
                if max(image.shape) > MOST_SIDE:
                    raise BadFile(f"{path}: expected sides of at most {MOST_SIDE} pixels, found {max(image.shape)}")
                pred = predict(model, image, size, precision)
            except (BadFile, MemoryError, cv2.error) as error:
                problems.append(str(error) if isinstance(error, BadFile) else f"{path}: cannot be resized ({error})")
                continue
            finish(writing)
            painted = class_set.paint(pred)
            pictures = zip(OUTPUT, (pred, painted, overlay(image, painted)))
            writing = [pool.submit(write_png, out / name / f"{path.stem}.png", picture) for name, picture in pictures]
            written += 1
        finish(writing)
    return written, problems


def find_images(inputs: list[Path], out: Path) -> tuple[list[Path], list[str]]:
    """The image files under the inputs, but for what was written to `out` earlier, and a message for each input without
    any and for each name that occurs twice."""
    found, problems, own = {}, [], {os.path.realpath(out / folder) for folder in OUTPUT}
    for given in inputs:
        paths = [given] if given.is_file() else sorted(given.rglob("*"))
        paths = [path for path in paths if path == given or path.suffix.lower() in IMAGE_SUFFIXES]
        paths = [path for path in paths if os.path.dirname(os.path.realpath(path)) not in own]
        if not paths:
            problems.append(f"{given}: expected an image or a folder of images, found none")
        for path in paths:
            if found.setdefault(path.stem, path) != path:
                problems.append(f"{path}: expected one image of this name, found also {found[path.stem]}")
    return list(found.values()), problems


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write ids (H, W) or RGB (H, W, 3), uint8, as a PNG file."""
    _, encoded = cv2.imencode(".png", picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    with atomic_open(path) as file:
        file.write(encoded)


def finish(writing: list[Future]) -> None:
    """Wait for the files of an image. Raises FileError when one could not be written: the others would not be, too."""
    for future in writing:
        future.result()
