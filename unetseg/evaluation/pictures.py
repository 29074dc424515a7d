"""Figures of what a run gets wrong, for notebooks and readers."""

from pathlib import Path

import numpy as np

from .. import plots
from ..data import load_split
from ..inference import trained_model
from .details import boundary, distance_outside
from .robustness import predict_all

NEAR = 3  # pixels from a boundary of the truth


def worst_cases(run: Path, processed: Path, results: dict, count: int = 2) -> plots.Figure:
    """The worst images of a scored split, and as many random ones: image, truth, prediction, and where that is wrong:
    orange within three pixels of a true boundary, red elsewhere."""
    dataset, (model, _) = load_split(processed, results["split"]), trained_model(run)
    stems = list(dataset.split.checked)
    worst = results["details"]["worst"][:count]
    places = [stems.index(row["image"]) for row in worst]
    others = np.setdiff1d(np.arange(len(stems)), places)
    places += np.random.default_rng(0).choice(others, min(count, len(others)), replace=False).tolist()
    images, masks = dataset.images[places].cpu().numpy(), dataset.masks[places].cpu().numpy()
    rows = []
    for image, mask, pred in zip(images, masks, predict_all(model, images).astype(np.uint8)):
        edges = np.any([boundary((mask == c).astype(np.uint8)) for c in np.unique(mask)], axis=0).astype(np.uint8)
        wrong = plots.error_map(image, mask, pred, distance_outside(edges) <= NEAR)
        rows.append([image, dataset.class_set.paint(mask), dataset.class_set.paint(pred), wrong])
    names = [f"worst, {row['miou']:.2f}" for row in worst] + ["random"] * (len(rows) - len(worst))
    return plots.panels(rows, ["image", "truth", "prediction", "errors"], dataset.class_set, names)
