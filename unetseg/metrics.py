"""Scores from one integer confusion matrix per image, under both void rules at once."""

import numpy as np
import torch
from torch import Tensor

from .classes import IGNORE_INDEX


def confusion_matrices(pred: Tensor, mask: Tensor, num_classes: int, kept: Tensor | None = None) -> Tensor:
    """Pixel counts per image, truth x prediction, with void as the last row: (N, C + 1, C) int64.

    pred  (N, ...) integer class ids 0..C-1
    mask  (N, ...) class ids 0..C-1 or IGNORE_INDEX, same shape; so is kept, bool: the pixels to count (default: all)
    """
    cells = (num_classes + 1) * num_classes
    truth = mask.long().where(mask != IGNORE_INDEX, num_classes)
    image = torch.arange(len(mask), device=mask.device).view(-1, *[1] * (mask.dim() - 1))
    cell = image * cells + truth * num_classes + pred
    counts = torch.bincount(cell.flatten() if kept is None else cell[kept], minlength=len(mask) * cells)
    return counts.reshape(len(mask), num_classes + 1, num_classes)


def under_rule(confusion: np.ndarray, void: str) -> np.ndarray:
    """(..., C + 1, C) counts -> (..., C, C): void pixels dropped ("ignore") or taken as class 0 ("background")."""
    counts = confusion[..., :-1, :].copy()
    if void == "background":
        counts[..., 0, :] += confusion[..., -1, :]
    return counts


def iou(counts: np.ndarray) -> np.ndarray:
    """(..., C, C) counts -> IoU of each class (..., C), NaN for a class without a pixel of truth."""
    hits, truth, pred = counts.diagonal(axis1=-2, axis2=-1), counts.sum(axis=-1), counts.sum(axis=-2)
    return np.where(truth > 0, hits / np.maximum(truth + pred - hits, 1), np.nan)


def miou(counts: np.ndarray) -> float:
    """Mean IoU over the classes present in the truth; NaN when there is none."""
    return float(np.nanmean(iou(counts))) if counts.any() else float("nan")


def accuracy(counts: np.ndarray) -> float:
    """Share of the pixels that are right."""
    return float(counts.trace() / max(counts.sum(), 1))


METRICS = {"miou": miou, "accuracy": accuracy}  # name -> function of (C, C) counts -> number; in every output


def scores(confusion: np.ndarray, names: tuple[str, ...], void: str) -> dict:
    """Every number in METRICS, and IoU, precision, recall and F1 per class, from (C + 1, C) counts; all in [0, 1].

    A class without a pixel of truth has scores None, is left out of mIoU, and is listed under "absent". A ratio with
    denominator 0 (the precision of a class never predicted) is 0.
    """
    counts = under_rule(np.asarray(confusion), void)
    hits, truth, pred = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    columns = {"iou": iou(counts), "precision": hits / np.maximum(pred, 1), "recall": hits / np.maximum(truth, 1)}
    columns["f1"] = 2 * hits / np.maximum(truth + pred, 1)
    classes = {}
    for c, name in enumerate(names):
        values = {key: float(column[c]) if truth[c] else None for key, column in columns.items()}
        classes[name] = values | {"pixels": int(truth[c])}
    totals = {name: value if (value := metric(counts)) == value else None for name, metric in METRICS.items()}
    return {"void": void, **totals, "classes": classes, "absent": [n for c, n in enumerate(names) if not truth[c]]}
