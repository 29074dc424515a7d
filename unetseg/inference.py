"""Trained weights at work: the scores of a split, and predictions for pictures of any size."""

import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from . import checkpoint, device, engine, losses, memory
from .classes import CLASS_SETS, ClassSet
from .data import Batches, SegmentationSet, load_split
from .files import atomic_open, exclusive, read_json, write_json
from .metrics import scores
from .model import UNet
from .pictures import BadFile, overlay, read_photo
from .processed import scored_split
from .trainer import forward

MOST_PIXELS = 8 * 1024 * 512  # that are scored at once
OUTPUT = ("ids", "colour", "overlay")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def trained_model(run_or_weights: Path) -> tuple[nn.Module, dict[str, str]]:
    """The U-Net with its trained weights, on the CPU, and metadata. Raises ValueError where they do not fit."""
    state, metadata = checkpoint.load_weights(run_or_weights)
    model = UNet(len(CLASS_SETS[metadata["class_set"]]), int(metadata["channels"]), int(metadata["depth"]))
    model.load_state_dict(state)
    return model, metadata


def best_model(run_or_weights: Path) -> tuple[nn.Module, dict[str, str]]:
    """The trained U-Net, ready to predict on the best device, and its metadata."""
    memory.keep_freed()
    model, metadata = trained_model(run_or_weights)
    return model.to(device.pick_device(), memory_format=torch.channels_last).eval(), metadata


def evaluate_run(run: Path, processed: Path, split: str | None = None) -> dict:
    """Score a run's best weights on a split ("test", or "val" where there is no test) under each void rule.

    Returns what it writes to results_<split>.json: scores, confusion matrix, and the context they hold in.
    """
    config = checkpoint.read_config(run)
    model, metadata = best_model(run)
    dataset = load_split(processed, split or scored_split(processed))
    found = {"class_set": dataset.class_set.name, "width": str(dataset.size[0]), "height": str(dataset.size[1])}
    if found.items() - metadata.items():
        expected = {key: metadata[key] for key in found}
        raise ValueError(f"{processed}: expected the data that {run} was trained on, {expected}; found {found}")
    names, where = dataset.class_set.names, next(model.parameters()).device
    at_once = min(8, max(1, MOST_PIXELS // (dataset.size[0] * dataset.size[1])))
    progress = tqdm(
        Batches(dataset, at_once, where).epoch(), desc=f"scoring {run.name}", unit="batch", leave=False, delay=1
    )
    result = engine.evaluate(model, progress, len(names), losses.cross_entropy)
    history = checkpoint.read_history(run)
    results = {
        "run": run.name,
        "stage": metadata["stage"],
        "split": dataset.split.name,
        "split_note": dataset.split.note
        + ("" if split or dataset.split.name == "test" else "; there is no test split"),
        "num_images": len(dataset),
        "size": list(dataset.size),
        "class_set": dataset.class_set.name,
        "trained_void": metadata["void"],
        "rules": {rule: scores(result.confusion, names, rule) for rule in dataset.class_set.void_rules},
        "confusion": result.confusion.tolist(),
        "best_epoch": int(metadata["epoch"]),
        "epochs": len(history),
        "planned_epochs": config["settings"]["epochs"],
        "train_seconds": sum(row["seconds"] for row in history),
        "images_per_second": result.images_per_second,
        **{key: config[key] for key in ("seed", "parameters", "precision", "device", "torch", "commit")},
    }
    try:
        write_json(run / f"results_{dataset.split.name}.json", results)
    except OSError as error:  # a run folder may be attached read-only
        warnings.warn(f"the scores are not kept: {error}", stacklevel=2)
    return results


def results_table(results: dict) -> str:
    """The scores of `evaluate_run` as text, under every rule, the trained one marked."""
    lines = [f"{results['run']}: {results['split_note']} ({results['split']}), {'x'.join(map(str, results['size']))}"]
    if results["split"].startswith("val"):
        lines.append("the best epoch was chosen on val, so these scores flatter")
    if results["epochs"] < results["planned_epochs"]:
        lines.append(f"training is not finished: {results['epochs']} of {results['planned_epochs']} epochs are done")
    for rule, score in results["rules"].items():
        mark = " (trained under this rule)" if rule == results["trained_void"] else ""
        lines.append(f"void={rule}{mark}: mIoU {score['miou'] or 0:.4f}, pixel accuracy {score['accuracy']:.4f}")
        lines.append(f"  {'class':<16}{'IoU':>8}{'precision':>11}{'recall':>8}{'F1':>8}")
        for name, values in score["classes"].items():
            if values["iou"] is None:
                lines.append(f"  {name:<16} absent from this split, not in mIoU")
            else:
                columns = [f"{values[key]:.4f}" for key in ("iou", "precision", "recall", "f1")]
                lines.append(f"  {name:<16}{columns[0]:>8}{columns[1]:>11}{columns[2]:>8}{columns[3]:>8}")
    return "\n".join(lines)


def headline(results: dict) -> dict[str, float | None]:
    """IoU per class, mIoU and accuracy under the rule that the run was trained under."""
    score = results["rules"][results["trained_void"]]
    ious = {name: values["iou"] for name, values in score["classes"].items()}
    return ious | {"mIoU": score["miou"], "accuracy": score["accuracy"]}


def read_results(run: Path) -> dict:
    """The scores that `evaluate_run` left in a run folder, those of the test split first; ValueError without any."""
    found = [path for split in ("test", "val", "val_all") if (path := run / f"results_{split}.json").is_file()]
    if not found:
        raise ValueError(
            f"{run}: expected results_<split>.json, found none; run `python -m unetseg evaluate {run}` first"
        )
    results = read_json(found[0])
    try:
        headline(results)
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise ValueError(f"{found[0]}: expected the scores of a run, found {reason}; evaluate anew") from None
    return results


def comparison_table(runs: list[Path]) -> str:
    """IoU per class of several scored runs as text, with each run's difference to the first in points (1/100)."""
    table = {run.name: headline(read_results(run)) for run in runs}
    (first, base), *others = table.items()
    lines = [f"{'IoU':<16}{first:>12}" + "".join(f"{name:>20}" for name, _ in others)]
    for name, value in base.items():
        pairs = [(column[name], value) for _, column in others]
        cells = [f"{new:>12.4f} ({100 * (new - old):+.1f})" if old is not None else "absent" for new, old in pairs]
        lines.append(
            f"{name:<16}{'absent' if value is None else f'{value:.4f}':>12}" + "".join(f"{c:>20}" for c in cells)
        )
    return "\n".join(lines)


@torch.inference_mode()
def predictions(
    model: nn.Module, dataset: SegmentationSet, count: int, precision: str = "fp32"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (n, H, W, 3) uint8, masks and predictions (n, H, W) uint8 of up to `count` images, evenly spread."""
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long()
    images, _ = dataset.batch(places, next(model.parameters()).device)
    preds = forward(model, images, precision).argmax(dim=1).to(torch.uint8).cpu()
    return dataset.images[places].numpy(), dataset.masks[places].numpy(), preds.numpy()


@torch.inference_mode()
def predict(model: nn.Module, image: np.ndarray, size: tuple[int, int], precision: str = "fp32") -> np.ndarray:
    """Class ids (H, W) uint8 for an RGB image (H, W, 3) uint8 of any size.

    size  width and height that the model was trained at: the image is brought there by area averaging, and the logits,
          not the classes, are brought back.
    """
    shrinks = image.shape[1] >= size[0] and image.shape[0] >= size[1]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    where = next(model.parameters()).device
    logits = forward(model, torch.from_numpy(small).to(where).permute(2, 0, 1)[None] / 255, precision)
    highest, pred = None, np.zeros(image.shape[:2], np.uint8)
    for class_id, logit in enumerate(logits[0].float().cpu().numpy()):  # all at full size would be 28 bytes a pixel
        large = cv2.resize(logit, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        if highest is None:
            highest = large
        wins = cv2.compare(large, highest, cv2.CMP_GT)  # 255 where true
        cv2.max(pred, cv2.min(wins, class_id), pred)
        cv2.max(large, highest, highest)
    return pred


def predict_files(run_or_weights: Path, inputs: list[Path], out: Path, precision: str = "auto") -> list[str]:
    """Predict images and folders of images; returns a message for each file that could not be used.

    Writes out/ids/<stem>.png (class ids), out/colour/<stem>.png and out/overlay/<stem>.png at the input's own size.
    """
    model, metadata = best_model(run_or_weights)
    class_set, size = CLASS_SETS[metadata["class_set"]], (int(metadata["width"]), int(metadata["height"]))
    own = {os.path.realpath(out / folder) for folder in OUTPUT}  # what we wrote there earlier
    paths, problems = _find_images(inputs, own)
    if paths:
        precision = device.choose(model, size, precision=precision, training=False).precision
    with exclusive(out, wait=True, below=OUTPUT):
        return problems + predict_each(model, paths, out, class_set, size, precision)


def predict_each(
    model: nn.Module, paths: list[Path], out: Path, class_set: ClassSet, size: tuple[int, int], precision: str
) -> list[str]:
    """Predict images one by one, each written while the next is read and predicted; returns a message per failure."""
    problems: list[str] = []
    writing: list[Future] = []  # of the image before; no more are kept
    with ThreadPoolExecutor(len(OUTPUT)) as pool:
        for path in tqdm(paths, unit="img", delay=1):
            try:
                image = read_photo(path)
                pred = predict(model, image, size, precision)
            except BadFile as error:
                problems.append(str(error))
                continue
            except OSError as error:
                problems.append(f"{error.filename or path}: {error.strerror}")
                continue
            problems += _finish(writing)
            painted = class_set.paint(pred)
            pictures = pred, painted, overlay(image, painted)
            files = [out / folder / f"{path.stem}.png" for folder in OUTPUT]
            writing = [pool.submit(_write, *pair) for pair in zip(files, pictures)]
        return problems + _finish(writing)


def _find_images(inputs: list[Path], own: set[str]) -> tuple[list[Path], list[str]]:
    """The image files under the inputs, and a message for each input without any and each name that occurs twice.

    own  folders whose files do not count
    """
    found: dict[str, Path] = {}
    problems = []
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


def _write(path: Path, picture: np.ndarray) -> None:
    """Write ids (H, W) or RGB (H, W, 3), uint8, as a PNG file."""
    _, encoded = cv2.imencode(".png", picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    with atomic_open(path) as file:
        file.write(encoded)


def _finish(writing: list[Future]) -> list[str]:
    """Wait for the files of an image; a message if not all of them could be written."""
    errors = [error for future in writing if (error := future.exception())]
    for error in errors:
        if not isinstance(error, OSError):
            raise error
    return [f"{error.filename}: {error.strerror}" for error in errors[:1]]
