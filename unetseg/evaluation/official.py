"""Scores at the labels' own size, as Cityscapes' benchmark takes them, and its own script's beside ours."""

import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..classes import CLASS_SETS, IGNORE_INDEX, ClassSet, stored
from ..files import UserError, exclusive, read_bytes, write_json
from ..images import read_png
from ..inference import predict, trained_model, write_picture
from ..processed import pair_paths, read_stats
from ..tools.layouts import TRAIN_IDS, DataSet, find_data
from ..tools.preprocess import shrink_mask
from .results import number, read_results

NINETEEN = CLASS_SETS["cityscapes19"]
EVALUATED = np.flatnonzero(NINETEEN.lookup[:34] != IGNORE_INDEX)  # label ids that count; the other rows are ignored
HONEST = ("road", "building", "vegetation", "sky")  # classes of the seven that the benchmark has, too
COMMON = ("human", "vehicle", "sky")  # and its categories that are one of the seven


def score_officially(run: Path, processed: Path, out: Path, split: str | None = None, raw: Path | None = None) -> dict:
    """Predict a scored split at the labels' size into `out`, and score it over the 19 evaluated label ids.

    Writes <city>_<seq>_<frame>_pred_labelIds.png (label ids), and results under "official" in results_<split>.json.
    Returns these. Raises UserError where the raw data are not there, or `out` holds other files.
    """
    results, (model, about) = read_results(run, split), trained_model(run)
    data_set, class_set = find_raw(processed, results, raw), stored(about)
    to_id = label_ids(class_set)
    splits = [name for name in ("train", "val") if name in data_set.splits]
    pairs = {f"{name}/{pair.stem}": pair for name in splits for pair in data_set.pairs(name)[0]}
    counts, ceiling, files = np.zeros((34, 34), np.int64), np.zeros((34, 34), np.int64), []
    with exclusive(out):
        if strangers := [p.name for p in out.iterdir() if not re.fullmatch(r"\.lock|.+_pred_labelIds\.png", p.name)]:
            raise UserError(f"{out}: expected a folder of its own for the predictions, found {strangers[0]}")
        for name in tqdm(results["images"], f"scoring {run.name} at full size", unit="img", leave=False, delay=1):
            folder, _, stem = name.partition("/")
            if name not in pairs:
                raise UserError(f"{data_set.root}: expected {stem}, found no such image; name the raw data with --raw")
            pair, layout = pairs[name], data_set.layout
            image = layout.read_image(pair.image, read_bytes(pair.image))
            truth = layout.read_labels(pair.labels, read_bytes(pair.labels), NINETEEN)
            pred = to_id[predict(model, image, (about["width"], about["height"]))]
            mask = read_png(pair_paths(processed, folder, stem)[1], "L")
            counts += count(truth, pred)
            ceiling += count(truth, to_id[shrink_mask(mask, truth.shape[::-1])])
            files.append((out / f"{stem}_pred_labelIds.png", pair.labels))
            write_picture(files[-1][0], pred)
    found = scores(counts, class_set) | {"ceiling": scores(ceiling, class_set), "images": len(files)}
    found |= script_scores(files)
    write_json(run / f"results_{results['split']}.json", results | {"official": found})
    return found


def find_raw(processed: Path, results: dict, raw: Path | None) -> DataSet:
    """The raw data that a processed split was made from. Raises UserError."""
    stats = read_stats(processed, results["images"][0].partition("/")[0])
    root = raw or Path(stats.get("raw", ""))
    if not root.is_dir():
        raise UserError(f"{root}: expected the raw data that {processed} was made from, found none; name it with --raw")
    data_set = find_data(root)
    if data_set.layout.class_sets[:1] != ("cityscapes7",):
        raise UserError(f"{root}: expected Cityscapes, whose benchmark this is, found {data_set.layout.name}")
    return data_set


def label_ids(class_set: ClassSet) -> np.ndarray:
    """Class id -> label id (256,) uint8 to be written; 0 (unlabeled) for what has none, such as background."""
    if class_set.names not in (NINETEEN.names, CLASS_SETS["cityscapes7"].names):
        raise UserError(f"{class_set.name}: expected cityscapes19 or cityscapes7, whose classes the benchmark knows")
    ids, table = dict(zip(NINETEEN.names, TRAIN_IDS)), np.zeros(256, np.uint8)
    ids["vehicle"] = ids["car"]
    table[: len(class_set)] = [ids.get(name, 0) for name in class_set.names]
    return table


def count(truth: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """(34, 34) pixels of label ids, truth x prediction."""
    return np.bincount(truth.ravel().astype(np.int64) * 34 + pred.ravel(), minlength=34 * 34).reshape(34, 34)


def scores(counts: np.ndarray, class_set: ClassSet) -> dict:
    """IoU of each label id that counts, over (34, 34) pixels: ignored rows count nowhere, ignored predictions miss.
    For seven classes only what has the same meaning in the benchmark."""
    valid = counts[EVALUATED]
    hits, truth, pred = counts[EVALUATED, EVALUATED], valid.sum(axis=1), valid[:, EVALUATED].sum(axis=0)
    iou = np.where(truth + pred > 0, hits / np.maximum(truth + pred - hits, 1), np.nan)
    named = dict(zip(NINETEEN.names, (None if value != value else float(value) for value in iou)))
    if class_set.names == NINETEEN.names:
        known = [value for value in named.values() if value is not None]
        return {"class_iou": named, "miou": float(np.mean(known)) if known else None}
    said = "seven classes: only these mean the same in the benchmark; there is no mean that could be compared"
    return {"class_iou": {name: named[name] for name in HONEST}, "note": said}


def script_scores(files: list[tuple[Path, Path]]) -> dict:
    """What cityscapesscripts says of the same files, where it is installed: classes, categories, instances."""
    try:
        import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as script
    except ImportError:
        return {"script": "not installed (pip install cityscapesscripts)"}
    if any(not str(labels).endswith("_gtFine_labelIds.png") for _, labels in files):
        return {"script": "not run: it reads files of label ids"}
    instances = all(Path(str(labels).replace("labelIds", "instanceIds")).is_file() for _, labels in files)
    missing = "" if hasattr(np, "in1d") else "iIoU is left out: the script calls numpy.in1d, which NumPy 2.4 removed"
    missing = missing or ("" if instances else "iIoU is left out: there are no files of instance ids")
    args = script.args
    args.evalInstLevelScore, args.quiet, args.JSONOutput = not missing, True, False
    found = script.evaluateImgLists([str(pred) for pred, _ in files], [str(labels) for _, labels in files], args)
    keys = {"class": "classScores", "category": "categoryScores", "class_instance": "classInstScores"}
    tables = {name: {k: v for k, v in found[key].items() if v == v} for name, key in keys.items() if found.get(key)}
    return {"script": missing or "complete", "script_scores": tables}


def official_table(found: dict) -> str:
    """Our scores as text, the script's, and the ceiling of a perfect prediction at the network's size."""
    script = found.get("script_scores", {})
    lines = [f"at the labels' own size, {found['images']} images; the script: {found['script']}"]
    lines.append(f"  {'class':<16}{'IoU':>8}{'script':>9}{'iIoU':>8}{'ceiling':>9}")
    for name, iou in found["class_iou"].items():
        theirs = (script.get(key, {}).get(name.replace("_", " ")) for key in ("class", "class_instance"))
        cells = zip((iou, *theirs, found["ceiling"]["class_iou"][name]), (8, 9, 8, 9))
        lines.append(f"  {name:<16}" + "".join(f"{number(cell):>{width}}" for cell, width in cells))
    ceiling = number(found["ceiling"].get("miou"))
    means = [f"mIoU {number(found['miou'])}, ceiling {ceiling}" if "miou" in found else found["note"]]
    categories = [item for item in script.get("category", {}).items() if "miou" in found or item[0] in COMMON]
    categories = ", ".join(f"{name} {number(iou)}" for name, iou in categories)
    return "\n".join(lines + means + [f"categories: {categories}"] * bool(categories))
