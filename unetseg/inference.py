"""Trained weights at work: the scores of a split, and predictions for images of any size."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from . import checkpoint
from .classes import CLASS_SETS
from .data import Batches, SegmentationSet, load_split
from .device import pick_device, precision_rule
from .files import UserError, atomic_open, exclusive, make_folder, read_json, write_json
from .images import BadFile, cv2, overlay, read_photo, shrink
from .losses import cross_entropy
from .metrics import METRICS, scores
from .processed import NoSplit, Split, find_split, scored_split
from .train import evaluate, forward

MOST_PIXELS = 8 * 1024 * 512  # that are scored at once
MOST_SIDE = 1_000_000  # pixels, as PNG files may have
OUTPUT = ("ids", "colour", "overlay")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def best_model(run_or_weights: Path) -> tuple[nn.Module, dict]:
    """The trained network, ready to predict on the best device, and what it was trained with."""
    model, about = checkpoint.load_model(run_or_weights)
    return model.to(pick_device(), memory_format=torch.channels_last).eval(), about


def evaluate_run(run: Path, processed: Path, split: str | None = None) -> dict:
    """Score a run's best weights on a split ("test", or "val" where there is no test) under each void rule, in fp32.

    Returns what it writes to results_<split>.json: scores, confusion matrix, and the context they hold in.
    """
    config, (model, about) = checkpoint.read_config(run), best_model(run)
    dataset = load_split(processed, split or scored_split(processed))
    found = {"classes": list(dataset.class_set.names), "width": dataset.size[0], "height": dataset.size[1]}
    if changed := checkpoint.differences(about, found):
        raise UserError("\n".join([f"{processed}: expected data like those {run} was trained on:", *changed]))
    at_once = min(8, max(1, MOST_PIXELS // (dataset.size[0] * dataset.size[1])))
    batches = Batches(dataset, at_once, next(model.parameters()).device).epoch()
    progress = tqdm(batches, f"scoring {run.name}", -(-len(dataset) // at_once), unit="batch", leave=False, delay=1)
    result = evaluate(model, progress, len(about["classes"]), cross_entropy)
    history = checkpoint.read_history(run)
    results = {"run": run.name, "split": dataset.split.name, "split_note": dataset.split.note}
    results["remarks"] = remarks(config, history, dataset.split, processed)
    results |= {"num_images": len(dataset), "size": list(dataset.size), "class_set": dataset.class_set.name}
    results |= {key: config["settings"][key] for key in ("stage", "seed", "precision")}
    results |= {key: joined(config, key) for key in ("device", "torch", "commit")}
    results |= {"epochs": len(history), "best_epoch": about["epoch"], "trained_void": about["void"]}
    results |= {"train_seconds": sum(r["seconds"] for r in history), "images_per_second": len(dataset) / result.seconds}
    results |= {"parameters": sum(weight.numel() for weight in model.parameters())}
    results["rules"] = {rule: scores(result.confusion, about["classes"], rule) for rule in dataset.class_set.void_rules}
    results |= {"confusion": result.confusion.tolist(), "weights_sha256": checkpoint.weights_sha256(run)}
    results |= {"data_sha256": dataset.split.sha256, "images": dataset.split.images}
    try:
        write_json(run / f"results_{dataset.split.name}.json", results)
    except UserError as error:  # a run folder may be attached read-only
        tqdm.write(f"warning: the scores are not kept: {error}")
    return results


def joined(config: dict, key: str) -> str:
    """A fact of all sessions that trained a run, such as its commits."""
    return " / ".join(dict.fromkeys(session[key] for session in config["sessions"]))


def remarks(config: dict, history: list[dict], split: Split, processed: Path) -> list[str]:
    """What a reader of a run's scores must know."""
    said, planned, trained_on = [], config["cycles"][-1], config["data"]

    def fingerprint(name: str) -> str:
        try:
            return find_split(processed, name).sha256
        except NoSplit:
            return ""

    if split.name.startswith("val"):
        said.append("the best epoch was chosen on val, so these scores flatter")
    if split.name == "val" and scored_split(processed) == "val":
        said.append("there is no test split")
    if len(history) < planned:
        said.append(f"training is not finished: {len(history)} of {planned} epochs are done")
    seen = set(split.images) & {image for found in trained_on.values() for image in found["images"]}
    if split.name == "test" and seen:
        said.append(f"{len(seen)} of these images were in the run's train or val split: they are not unseen")
    if any(fingerprint(name) != trained_on[name]["sha256"] for name in trained_on):
        said.append(f"{processed} does not hold the data that the run was trained on")
    return said


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def results_table(results: dict) -> str:
    """The scores of `evaluate_run` as text, under every rule, the trained one marked."""
    size = "x".join(map(str, results["size"]))
    lines = [f"{results['run']}: {results['split_note']} ({results['split']}), {size}", *results["remarks"]]
    for rule, score in results["rules"].items():
        mark = " (trained under this rule)" if rule == results["trained_void"] else ""
        totals = ", ".join(f"{ {'miou': 'mIoU'}.get(name, name) } {number(score[name])}" for name in METRICS)
        lines += [f"void={rule}{mark}: {totals}", f"  {'class':<16}{'IoU':>8}{'precision':>11}{'recall':>8}{'F1':>8}"]
        for name, values in score["classes"].items():
            iou, precision, recall, f1 = (number(values[key]) for key in ("iou", "precision", "recall", "f1"))
            absent = "  absent from this split, not in mIoU" if values["iou"] is None else ""
            lines.append(f"  {name:<16}{iou:>8}{precision:>11}{recall:>8}{f1:>8}{absent}")
    return "\n".join(lines)


def headline(results: dict) -> dict[str, float | None]:
    """IoU per class, mIoU and the other totals under the rule that the run was trained under."""
    score = results["rules"][results["trained_void"]]
    ious = {name: values["iou"] for name, values in score["classes"].items()}
    return ious | {{"miou": "mIoU"}.get(name, name): score[name] for name in METRICS}


def read_results(run: Path, split: str | None = None) -> dict:
    """The scores that `evaluate_run` left in a run folder, those of the test split first.

    Raises UserError when there are none, or when they are those of other weights than the folder's.
    """
    names = (split,) if split else ("test", "val", "val_all")
    path = next((path for name in names if (path := run / f"results_{name}.json").is_file()), None)
    if path is None:
        raise UserError(f"{run}: expected results_<split>.json, found none; run `python -m unetseg evaluate` first")
    results = read_json(path)
    if results.get("weights_sha256") != checkpoint.weights_sha256(run):
        raise UserError(f"{path}: these are scores of other weights than {run} holds; run `evaluate` again")
    return results


def comparable(results: list[dict]) -> None:
    """Raise UserError unless all were scored on the same images, at the same size and under the same void rule."""
    for key in ("split", "data_sha256", "size", "trained_void"):
        if len({str(result[key]) for result in results}) > 1:
            found = ", ".join(f"{result['run']}: {str(result[key])[:20]}" for result in results)
            raise UserError(f"expected runs with the same {key}, found {found}; evaluate them alike")


def comparison_table(runs: list[Path]) -> str:
    """IoU per class of several scored runs as text, with each run's difference to the first in points (1/100)."""
    results = [read_results(run) for run in runs]
    comparable(results)
    base, *others = [headline(result) for result in results]
    lines = [f"{'IoU':<16}{runs[0].name:>12}" + "".join(f"{run.name:>20}" for run in runs[1:])]
    for name, old in base.items():
        cells = ["–" if old is None else f"{new[name]:.4f} ({100 * (new[name] - old):+.1f})" for new in others]
        lines.append(f"{name:<16}{number(old):>12}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join([*lines, *dict.fromkeys(remark for result in results for remark in result["remarks"])])


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
    model, about = best_model(run_or_weights)
    class_set, size = CLASS_SETS[about["class_set"]], (about["width"], about["height"])
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
