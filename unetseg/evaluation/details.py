"""What mIoU does not say: boundaries, sizes of objects, calibration, the spread over images and places."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..classes import IGNORE_INDEX, ClassSet
from ..images import cv2
from ..metrics import miou, under_rule

DISTANCES = (1, 2, 3)  # pixels from a boundary
SIZES = {"small": 0.001, "medium": 0.01, "large": 1.0}  # largest share of the image
BINS = 15  # of confidence
THINGS = ("person", "rider", "pedestrian", "bicyclist", "vehicle", "car", "truck", "bus", "motorcycle", "bicycle")
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


class Details:
    """Sums over a split, gathered batch by batch by `look`, from which `summary` makes the scores.

    Void pixels count nowhere: the prediction takes the truth's void before boundaries and objects are compared.
    """

    def __init__(self, class_set: ClassSet) -> None:
        self.class_set, number = class_set, len(class_set)
        self.regions = np.zeros((2, len(DISTANCES), number))  # of boundary IoU: intersection, union
        self.edges = np.zeros((4, len(DISTANCES), number))  # found, predicted; recovered, true
        self.objects = {name: np.zeros((3, len(SIZES))) for name in class_set.names if name in THINGS}  # of by_size
        self.bins = np.zeros((3, BINS))  # pixels, right ones, confidence

    def look(self, logits: Tensor, masks: Tensor) -> None:
        """Add a batch: logits (N, C, H, W) float and masks (N, H, W), void marked."""
        confidence, preds = logits.softmax(dim=1).max(dim=1)
        valid = masks != IGNORE_INDEX
        place = (confidence[valid] * BINS).long().clamp(max=BINS - 1)
        for row, values in enumerate((None, (preds == masks)[valid].double(), confidence[valid].double())):
            self.bins[row] += torch.bincount(place, values, minlength=BINS).cpu().numpy()
        preds = preds.where(valid, IGNORE_INDEX).to("cpu", torch.uint8).numpy()
        for pred, mask in zip(preds, masks.to("cpu", torch.uint8).numpy()):
            for class_id in np.setdiff1d([pred, mask], IGNORE_INDEX):
                self._compare(int(class_id), *((ids == class_id).view(np.uint8) for ids in (pred, mask)))

    def _compare(self, class_id: int, pred: np.ndarray, mask: np.ndarray) -> None:
        edges = [boundary(region) for region in (pred, mask)]
        outside = [distance_outside(edge) for edge in edges]
        for row, distance in enumerate(DISTANCES):
            bands = [inner_band(region, distance) for region in (pred, mask)]
            self.regions[:, row, class_id] += (bands[0] & bands[1]).sum(), (bands[0] | bands[1]).sum()
            hits = [np.count_nonzero(outside[1 - side][edges[side] > 0] <= distance) for side in (0, 1)]
            self.edges[:, row, class_id] += hits[0], edges[0].sum(), hits[1], edges[1].sum()
        name = self.class_set.names[class_id]
        if name in self.objects:
            self.objects[name] += by_size(pred, mask)

    def summary(self) -> dict:
        """Boundary IoU and F, IoU by size, calibration error, all in [0, 1]; None where there is nothing to score."""
        names, present = self.class_set.names, self.edges[3].any(axis=0)  # classes of the truth
        boundary_iou = self.regions[0] / np.maximum(self.regions[1], 1)
        found, predicted, recovered, true = self.edges
        precision, recall = found / np.maximum(predicted, 1), recovered / np.maximum(true, 1)
        f = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        tables = {}
        for title, values in (("boundary_iou", boundary_iou), ("boundary_f", f)):
            for row, distance in enumerate(DISTANCES):
                scores = {name: float(values[row, c]) if present[c] else None for c, name in enumerate(names)}
                tables[f"{title}_{distance}px"] = {"mean": mean(scores.values()), "classes": scores}
        sizes = {}
        for name, (hit, area, false) in self.objects.items():
            whole = area + false
            sizes[name] = {s: float(hit[i] / whole[i]) if whole[i] else None for i, s in enumerate(SIZES)}
        error = np.abs(self.bins[1] - self.bins[2]).sum() / max(self.bins[0].sum(), 1)
        return tables | {"iou_by_size": sizes, "calibration_error": float(error)}


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def eroded(region: np.ndarray, times: int, kernel: np.ndarray) -> np.ndarray:
    """A region (H, W) uint8 0/1 without its outermost pixels; the image's border counts as its end."""
    return cv2.erode(region, kernel, iterations=times, borderType=cv2.BORDER_CONSTANT, borderValue=0)


def inner_band(region: np.ndarray, distance: int) -> np.ndarray:
    """The pixels of a region within `distance` of its boundary; after Cheng et al., "Boundary IoU", CVPR 2021."""
    return (region - eroded(region, distance, np.ones((3, 3), np.uint8))).astype(bool)


def boundary(region: np.ndarray) -> np.ndarray:
    """The outermost pixels of a region (H, W) uint8 0/1, with four neighbours."""
    return region - eroded(region, 1, _CROSS)


def distance_outside(edge: np.ndarray) -> np.ndarray:
    """Each pixel's distance to the nearest pixel of a boundary; infinite where there is none."""
    if not edge.any():
        return np.full(edge.shape, np.inf, np.float32)
    return cv2.distanceTransform(1 - edge, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def by_size(pred: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pixels (3, sizes) of a class in one image: hit, true, and false ones. A false pixel belongs to the nearest object
    of the truth; where there is none, it counts for the size of its own connected region."""
    limits = np.array(list(SIZES.values())) * mask.size
    number, parts, stats, _ = cv2.connectedComponentsWithStats(mask if mask.any() else pred)
    areas = stats[:, cv2.CC_STAT_AREA]  # of each object; the first is the background
    rows = np.zeros(number), np.zeros(number), areas
    if mask.any():
        hits = np.bincount(parts[(pred & mask) > 0], minlength=number)
        pixels = {"labelType": cv2.DIST_LABEL_PIXEL}
        _, nearest = cv2.distanceTransformWithLabels(1 - mask, cv2.DIST_L2, cv2.DIST_MASK_5, **pixels)
        owner = np.zeros(nearest.max() + 1, np.int64)
        owner[nearest[mask > 0]] = parts[mask > 0]
        false = np.bincount(owner[nearest[(pred > mask)]], minlength=number)
        rows = hits, areas, false
    sizes = np.searchsorted(limits, areas[1:])
    return np.stack([np.bincount(sizes, row[1:], minlength=len(SIZES)) for row in rows])


def spread(confusions: np.ndarray, stems: list[str], void: str, worst: int = 5) -> dict:
    """The distribution of mIoU over images (N, C + 1, C), the worst ones, and the pooled mIoU of each city or clip."""
    each = np.array([miou(under_rule(confusion, void)) for confusion in confusions])
    known = ~np.isnan(each)
    quantiles = {f"{q}%": float(np.quantile(each[known], q / 100)) for q in (5, 25, 50, 75, 95)} if known.any() else {}
    order = [int(i) for i in np.argsort(np.where(known, each, np.inf), kind="stable")[: min(worst, known.sum())]]
    places: dict[str, list[int]] = {}
    for row, stem in enumerate(stems):
        if match := re.fullmatch(r"([a-z-]+)_\d{6}_\d{6}|([^_]+)_f?\d{5,6}", stem):  # Cityscapes' city, CamVid's clip
            places.setdefault(match[1] or match[2], []).append(row)
    pooled = {place: miou(under_rule(confusions[rows].sum(axis=0), void)) for place, rows in places.items()}
    worst_ones = [{"image": stems[row], "miou": float(each[row])} for row in order]
    by_place = {place: {"images": len(places[place]), "miou": value} for place, value in sorted(pooled.items())}
    return {"quantiles": quantiles, "worst": worst_ones, "places": by_place}
