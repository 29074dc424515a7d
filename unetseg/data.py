"""A split of the processed folder in memory: batches, class weights, instance boxes."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from . import distributed
from .augment import AUGMENTATIONS, Source, epoch_draws, stream
from .classes import IGNORE_INDEX, ClassSet, stored
from .files import UserError
from .images import cv2
from .processed import Split, find_split, read_pair, read_stats
from .settings import Settings, SettingsError, named_by

MOST_BOXES, SMALLEST_INSTANCE = 16, 12  # boxes kept per image; pixels that an instance must have


@dataclass
class SegmentationSet:
    """One split in memory: images (N, H, W, 3) uint8, masks (N, H, W) uint8 class ids, 255 = void (class 0 under
    void="background"), and num_pixels (N, C), the pixels per image and class in these masks."""

    split: Split
    class_set: ClassSet
    images: Tensor
    masks: Tensor
    num_pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.images.shape[2], self.images.shape[1]

    def batch(self, indices: Tensor, device: torch.device, shrink: int = 1) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) float32 in [0, 1] and masks (N, H, W) int64 of these indices, on `device`, shrunk by
        area averaging and by the pixel under each centre. A GPU with room for four times as much keeps the split."""
        needed = 4 * (self.images.nbytes + self.masks.nbytes)
        if device.type == "cuda" and not self.images.is_cuda and torch.cuda.mem_get_info(device)[0] > needed:
            self.images, self.masks = self.images.to(device), self.masks.to(device)
        indices = indices.to(self.images.device)
        images, masks = self.images[indices].to(device), self.masks[indices].to(device)
        images = images.permute(0, 3, 1, 2) / 255
        if shrink == 1:
            return images, masks.long()
        return F.avg_pool2d(images, shrink), masks[:, shrink // 2 :: shrink, shrink // 2 :: shrink].long()


def load_split(processed: Path, name: str, void: str = "ignore") -> SegmentationSet:
    """Read "train", "val", "test" or "val_all" of the processed folder into memory, with a thread per core. Raises
    UserError naming every file that is missing, damaged, or not the one that preprocessing wrote."""
    split = find_split(processed, name)
    stats = read_stats(processed, split.folder)
    class_set, (width, height), stems = stored(stats), stats["size"], list(split.checked)
    if void not in class_set.void_rules:
        raise SettingsError(f"void: expected {class_set.void_rules[0]} for {class_set.name}, found {void!r}")
    images, masks = np.empty((len(stems), height, width, 3), np.uint8), np.empty((len(stems), height, width), np.uint8)
    num_pixels = np.empty((len(stems), len(class_set) + 1), np.int64)

    def read(row: int) -> str:
        """Fill a row; returns what is wrong with its files, or ""."""
        stem = stems[row]
        try:
            pair = read_pair(processed, split.folder, stem, len(class_set), (width, height))
        except UserError as error:
            return str(error)
        images[row], masks[row], num_pixels[row], crc32 = pair
        return "" if crc32 == split.checked[stem] else f"{split.folder}/{stem}: not the pair that preprocessing wrote"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = tqdm(pool.map(read, range(len(stems))), f"reading {name}", len(stems), unit="img", leave=False, delay=1)
        if problems := [problem for problem in rows if problem]:
            raise UserError("\n".join([f"{processed}: {len(problems)} unusable; rerun preprocessing:", *problems]))
    if void == "background":
        masks[masks == IGNORE_INDEX] = 0
        num_pixels[:, 0] += num_pixels[:, -1]
    return SegmentationSet(split, class_set, torch.from_numpy(images), torch.from_numpy(masks), num_pixels[:, :-1])


@dataclass
class Batches:
    """The batches of a data set: in order as they are or, with `settings`, shuffled and augmented, the first
    `half_epochs` epochs at half the size. Of several processes each gets its share of every batch, which may be empty
    at the end of an epoch."""

    dataset: SegmentationSet
    batch_size: int
    device: torch.device
    settings: Settings | None = None
    half_epochs: int = 0

    def __post_init__(self) -> None:
        if self.settings:
            self.boxes, self.num_boxes = instance_boxes(self.dataset, self.settings.aim_at)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, masks and indices (N,) of each batch of an epoch, from batch `start` on."""
        total, settings, steps = len(self.dataset), self.settings, []
        shrink = 2 if settings and number <= self.half_epochs else 1
        order = torch.arange(total)
        if settings:
            order = torch.randperm(total, generator=stream("order", settings.seed, number))
            for name in settings.augment:
                table, function = epoch_draws(name, total, settings.seed, number), AUGMENTATIONS[name]
                steps.append((function, table, named_by(function, vars(settings))))
        for first in range(start * self.batch_size, total, self.batch_size):
            indices = distributed.share(order[first : first + self.batch_size])
            images, masks = self.dataset.batch(indices, self.device, shrink)
            for function, table, knobs in steps if len(indices) else ():
                draws = dict(zip(function.draws, table[indices].to(self.device).unbind(1), strict=True))
                aims = (self.boxes[indices] / shrink).to(self.device), self.num_boxes[indices].to(self.device)
                source = Source(*aims, lambda draw: self.dataset.batch((draw * total).long(), self.device, shrink)[0])
                images, masks = function(images, masks, draws, source, **knobs)
            yield images, masks, indices


WEIGHTINGS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # of (share of each class, median frequency)
    "none": lambda share, median: np.ones_like(share),
    "sqrt": lambda share, median: share**-0.5,
    "inverse": lambda share, median: 1 / share,
    "median": lambda share, median: 1 / median,  # Eigen & Fergus, ICCV 2015
    "enet": lambda share, median: 1 / np.log(1.02 + share),  # Paszke et al., 2016
}


def class_weights(num_pixels: np.ndarray, weighting: str = "sqrt") -> np.ndarray:
    """Weights per class (C,), by a name in WEIGHTINGS, from (N, C) pixels per image and class; their mean is 1 over the
    classes present, and a class never seen gets 1."""
    total, present = num_pixels.sum(axis=0), num_pixels.sum(axis=0) > 0
    pixels_with = ((num_pixels > 0) * num_pixels.sum(axis=1, keepdims=True)).sum(axis=0)  # of images with the class
    found = WEIGHTINGS[weighting](total[present] / total.sum(), total[present] / pixels_with[present])
    weights = np.ones(len(total))
    weights[present] = found / found.mean()
    return weights


def instance_boxes(dataset: SegmentationSet, names: tuple[str, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Bounding boxes of the connected components of some classes (people by default), largest first: (N, MOST_BOXES, 4)
    float x0, y0, x1, y1, and their number per image (N,) int64. Raises SettingsError for an unknown class."""
    known = dataset.class_set.names
    names = dataset.class_set.people if names is None else names
    if unknown := set(names) - set(known):
        raise SettingsError(f"aim_at: expected some of {', '.join(known)}; found {', '.join(sorted(unknown))}")
    wanted = [known.index(name) for name in names]
    boxes, num_boxes = np.zeros((len(dataset), MOST_BOXES, 4), np.float32), np.zeros(len(dataset), np.int64)

    def find(row: int) -> None:
        found, mask = [], dataset.masks[row].cpu().numpy()
        for class_id in wanted:
            components = cv2.connectedComponentsWithStats((mask == class_id).astype(np.uint8))[2][1:]
            found += [c for c in components.tolist() if c[4] >= SMALLEST_INSTANCE]  # x, y, w, h, area
        found = sorted(found, key=lambda c: -c[4])[:MOST_BOXES]
        num_boxes[row] = len(found)
        for place, (x, y, w, h, _) in enumerate(found):
            boxes[row, place] = x, y, x + w, y + h

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(find, range(len(dataset))))
    return torch.from_numpy(boxes), torch.from_numpy(num_boxes)
