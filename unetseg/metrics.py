"""Scores from one integer confusion matrix per split, under both void rules at once."""

import numpy as np
import torch
from torch import Tensor

from .classes import IGNORE_INDEX


def confusion_matrix(pred: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Pixel counts, truth x prediction, with void as a last row of its own: (C + 1, C) int64.

    pred  integer class ids 0..C-1, any shape
    mask  class ids 0..C-1 or IGNORE_INDEX, same shape
    """
    truth = mask.long().where(mask != IGNORE_INDEX, num_classes)
    counts = torch.bincount((truth * num_classes + pred).flatten(), minlength=(num_classes + 1) * num_classes)
    return counts.reshape(num_classes + 1, num_classes)


def under_rule(confusion: np.ndarray, void: str) -> np.ndarray:
    """(C + 1, C) counts -> (C, C): void pixels dropped ("ignore") or taken as class 0 ("background")."""
    counts = confusion[:-1].copy()
    if void == "background":
        counts[0] += confusion[-1]
    return counts


def scores(confusion: np.ndarray, names: tuple[str, ...], void: str) -> dict:
    """IoU, precision, recall and F1 per class, their mean IoU, and pixel accuracy; all in [0, 1].

    confusion  (C + 1, C) integer pixel counts from `confusion_matrix`
    void       "ignore" or "background"
    A class without a pixel of truth has scores None, is left out of mIoU, and is listed under "absent". A ratio with
    nothing below the line (the precision of a class never predicted) is 0.
    """
    counts = under_rule(np.asarray(confusion), void)
    hits, truth, pred = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    columns = {
        "iou": hits / np.maximum(truth + pred - hits, 1),
        "precision": hits / np.maximum(pred, 1),
        "recall": hits / np.maximum(truth, 1),
        "f1": 2 * hits / np.maximum(truth + pred, 1),
    }
    present = truth > 0
    classes = {
        name: {key: float(values[c]) if present[c] else None for key, values in columns.items()}
        | {"pixels": int(truth[c])}
        for c, name in enumerate(names)
    }
    return {
        "void": void,
        "miou": float(columns["iou"][present].mean()) if present.any() else None,
        "accuracy": float(hits.sum() / max(truth.sum(), 1)),
        "classes": classes,
        "absent": [name for c, name in enumerate(names) if not present[c]],
    }
