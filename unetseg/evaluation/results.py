"""Scores of a run on a split: written to its folder, read back only while they are true, and shown as tables."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import checkpoint
from ..data import Batches, load_split
from ..files import UserError, atomic_open, read_json, write_json
from ..inference import trained_model
from ..losses import cross_entropy
from ..metrics import METRICS, scores
from ..processed import NoSplit, Split, find_split, read_stats, scored_split, training_splits
from ..settings import PRESETS
from ..train import evaluate
from .details import DISTANCES, Details, spread

MOST_PIXELS = 8 * 1024 * 512  # that are scored at once


def evaluate_run(run: Path, processed: Path, split: str | None = None) -> dict:
    """Score a run on a split (its fold, else "test", or "val" where there is no test) under each void rule, in fp32.

    Returns what it writes to results_<split>.json: scores, confusion matrix, and the context they hold in.
    """
    config, (model, about) = checkpoint.read_config(run), trained_model(run)
    dataset = load_split(processed, split or scored_split(processed, config["settings"]["fold"]))
    found = {"classes": list(dataset.class_set.names), "width": dataset.size[0], "height": dataset.size[1]}
    if changed := checkpoint.differences(about, found):
        raise UserError("\n".join([f"{processed}: expected data like those {run} was trained on:", *changed]))
    at_once = min(8, max(1, MOST_PIXELS // (dataset.size[0] * dataset.size[1])))
    batches = Batches(dataset, at_once, next(model.parameters()).device).epoch()
    progress = tqdm(batches, f"scoring {run.name}", -(-len(dataset) // at_once), unit="batch", leave=False, delay=1)
    details = Details(dataset.class_set)
    result = evaluate(model, progress, len(about["classes"]), cross_entropy, look=details.look)
    history = checkpoint.read_history(run)
    results = {"run": run.name, "split": dataset.split.name, "split_note": dataset.split.note}
    results["remarks"] = remarks(config, history, dataset.split, processed)
    results |= {"num_images": len(dataset), "size": list(dataset.size), "class_set": dataset.class_set.name}
    results |= {key: config["settings"][key] for key in ("stage", "seed", "precision")}
    results |= {key: joined(config["sessions"], key) for key in ("device", "torch", "commit")}
    results |= {"epochs": len(history), "train_seconds": sum(row["seconds"] for row in history)}
    results |= {"parameters": sum(p.numel() for p in model.parameters()), "trained_void": about["void"]}
    results["rules"] = {rule: scores(result.confusion, about["classes"], rule) for rule in dataset.class_set.void_rules}
    results |= {"confusion": result.confusion.tolist(), "weights_sha256": checkpoint.weights_sha256(run)}
    results |= {"data_sha256": dataset.split.sha256, "images": dataset.split.images}
    results["details"] = details.summary() | spread(result.confusions, [*dataset.split.checked], about["void"])
    keep(run, results, result.confusions)
    return results


def keep(run: Path, results: dict, confusions: np.ndarray) -> None:
    """Write results_<split>.json, and the matrix of each image for `compare`, into the run folder."""
    try:
        with atomic_open(run / f"confusions_{results['split']}.npz") as file:
            np.savez_compressed(file, confusions=confusions.astype(np.uint32), weights_sha256=results["weights_sha256"])
        write_json(run / f"results_{results['split']}.json", results)
    except UserError as error:  # a run folder may be attached read-only
        tqdm.write(f"warning: the scores are not kept: {error}")


def joined(sessions: list[dict], key: str) -> str:
    """A fact of all sessions that trained a run, or of several runs, such as their commits."""
    return " / ".join(dict.fromkeys(session[key] for session in sessions))


def remarks(config: dict, history: list[dict], split: Split, processed: Path) -> list[str]:
    """What a reader of a run's scores must know."""
    planned, trained_on, short = config["cycles"][-1], config["data"], "too few to read anything into the scores"
    try:
        there = [find_split(processed, name).sha256 for name in training_splits(config["settings"]["fold"])]
    except NoSplit:
        there = []
    usual, done, number = PRESETS[config["settings"]["stage"]]["epochs"], len(history), len(split.images)
    used = trained_on if split.name == "test" else {"train": trained_on["train"]}
    seen = set(split.images) & {image for found in used.values() for image in found["images"]}
    said = {
        "there is no test split": split.name == "val" and scored_split(processed) == "val",
        f"trained for {done} of the usual {usual} epochs: {short}": done < usual / 4,
        f"only {number} images are scored: {short}": number < 20,
        f"training is not finished: {done} of {planned} epochs are done": done < planned,
        f"{len(seen)} of these images were in the run's {' or '.join(used)} split: they are not unseen": seen,
        "it started from weights of other training data, which may hold these images: then they are not unseen":
            {*(config.get("starts") or [])} - {trained_on["train"]["sha256"]},
        f"{processed} does not hold the data that the run was trained on":
            there != [found["sha256"] for found in trained_on.values()],
    }  # fmt: skip
    return [*read_stats(processed, split.folder).get("notes", []), *(text for text, holds in said.items() if holds)]


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
    return "\n".join(lines + details_lines(results["details"]))


def details_lines(details: dict) -> list[str]:
    """What `Details` and `spread` found, as lines of text; void counts nowhere here."""
    said = [f"  {n} px: IoU {number(details[f'boundary_iou_{n}px']['mean'])}, " for n in DISTANCES]
    said = [line + f"F {number(details[f'boundary_f_{n}px']['mean'])}" for line, n in zip(said, DISTANCES)]
    lines = ["boundaries, mean over classes:", *said, f"calibration error {number(details['calibration_error'])}"]
    for name, sizes in details["iou_by_size"].items():
        lines.append(f"{name} by size: " + ", ".join(f"{size} {number(iou)}" for size, iou in sizes.items()))
    if quantiles := details["quantiles"]:
        lines.append("mIoU of single images: " + ", ".join(f"{q} {value:.3f}" for q, value in quantiles.items()))
    lines += ["worst: " + ", ".join(f"{row['image']} {row['miou']:.3f}" for row in details["worst"])]
    places = [f"{name} {row['miou']:.3f} ({row['images']})" for name, row in details["places"].items()]
    return lines + (["by city or clip: " + ", ".join(places)] if len(places) > 1 else [])


def headline(results: dict) -> dict[str, float | None]:
    """IoU per class, mIoU and the other totals under the rule that the run was trained under."""
    score = results["rules"][results["trained_void"]]
    ious = {name: values["iou"] for name, values in score["classes"].items()}
    return ious | {{"miou": "mIoU"}.get(name, name): score[name] for name in METRICS}


def read_results(run: Path, split: str | None = None) -> dict:
    """The scores that `evaluate_run` left in a run folder: of its fold, else of the test split, else of val.

    Raises UserError when there are none, or when they are those of other weights than the folder's.
    """
    fold = checkpoint.read_config(run)["settings"]["fold"]
    names = (split,) if split else ("test", "val", "val_all") if fold is None else (f"fold{fold}",)
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
