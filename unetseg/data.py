"""The splits of a processed folder as data sets in memory: batches, class frequencies and weights, instances."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from . import memory, processes
from .augment import epoch_draws
from .classes import CLASS_SETS, IGNORE_INDEX, ClassSet
from .processed import Split, find_split, read_pair, read_stats

PEOPLE = ("person", "rider", "pedestrian", "bicyclist")
WEIGHTINGS = ("sqrt", "inverse", "median", "enet", "none")


class SegmentationSet(Dataset):
    """One split in memory; item i is (image float32 (3, H, W) in [0, 1], mask int64 (H, W), 255 = void).

    images      (N, H, W, 3) uint8
    masks       (N, H, W) uint8 class ids; under void="background" void has become class 0
    num_pixels  (N, C) pixels per image and class in these masks
    sha256      of names and contents, as they were stored
    """

    def __init__(
        self, split: Split, class_set: ClassSet, images: Tensor, masks: Tensor, num_pixels: np.ndarray, sha256: str
    ) -> None:
        self.split, self.class_set, self.sha256 = split, class_set, sha256
        self.images, self.masks, self.num_pixels = images, masks, num_pixels
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.batch(torch.tensor([index]))
        return image[0], mask[0]

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) float32 in [0, 1] and masks (N, H, W) int64 of these indices, on `device`."""
        images, masks = self._near(torch.device(device))
        images, masks = (stored[indices.to(stored.device)].to(device) for stored in (images, masks))
        return images.permute(0, 3, 1, 2) / 255, masks.long()

    def _near(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and masks on `device`, if that is a GPU with room for four times as much; else where they are."""
        if device not in self._copies:
            stored = self.images, self.masks
            fits = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 4 * sum(
                part.nbytes for part in stored
            )
            self._copies[device] = tuple(part.to(device) for part in stored) if fits else stored
        return self._copies[device]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.images.shape[2], self.images.shape[1]


@dataclass
class Batches:
    """The batches of a data set, epoch by epoch: in order as they are, or shuffled and augmented.

    Of several processes each gets its part of every batch, which may be empty at the end of an epoch.
    augment  None, or a function (images, masks, rows of draws, indices) -> (images, masks)
    """

    dataset: SegmentationSet
    batch_size: int
    device: torch.device
    seed: int = 0
    augment: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from number `start` on."""
        order, table = epoch_draws(len(self.dataset), self.seed, number)
        if self.augment is None:
            order = torch.arange(len(self.dataset))
        for first in range(start * self.batch_size, len(order), self.batch_size):
            indices = processes.own(order[first : first + self.batch_size])
            images, masks = self.dataset.batch(indices, self.device)
            if self.augment is not None and len(indices):
                images, masks = self.augment(images, masks, table[indices].to(self.device), indices)
            yield images, masks


def load_split(processed: Path, name: str, void: str = "ignore") -> SegmentationSet:
    """Read a split of the processed folder into memory.

    name  "train", "val", "test" or "val_all"
    Raises ValueError, naming every offender, for orphans, wrong shapes and types, and values outside the class set.
    """
    memory.keep_freed()
    split = find_split(processed, name)
    stats = read_stats(processed, split.folder)
    class_set = CLASS_SETS[stats["class_set"]]
    if void not in class_set.void_rules:
        raise ValueError(f"void rule: expected one of {class_set.void_rules} for {class_set.name}, found {void!r}")
    images, masks, num_pixels, sha256 = _read_pairs(processed, split, class_set, tuple(stats["size"]))
    if void == "background":
        masks[masks == IGNORE_INDEX] = 0
        num_pixels[:, 0] += num_pixels[:, -1]
    tensors = torch.from_numpy(images), torch.from_numpy(masks)
    return SegmentationSet(split, class_set, *tensors, num_pixels[:, :-1], sha256)


def _read_pairs(
    processed: Path, split: Split, class_set: ClassSet, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Images, masks, pixels per class and void (N, C + 1), and a fingerprint of it all; read by a thread per core."""
    number, (width, height) = len(split.stems), size
    images, masks = _room((number, height, width, 3)), _room((number, height, width))
    num_pixels, checksums = np.empty((number, len(class_set) + 1), np.int64), np.empty((number, 2), np.uint32)

    def read(row: int) -> str:
        """Fill a row; returns what is wrong with its files, or ""."""
        try:
            pair = read_pair(processed, split, split.stems[row], class_set, size)
        except (ValueError, OSError) as error:
            return str(error)
        images[row], masks[row], num_pixels[row], checksums[row] = pair
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = tqdm(pool.map(read, range(number)), f"reading {split.name}", number, unit="img", leave=False, delay=1)
        problems = [problem for problem in said if problem]
    if problems:
        raise ValueError("\n".join([f"{len(problems)} unusable files; rerun preprocessing:", *problems]))
    names = "\0".join(split.stems).encode("utf-8", "surrogateescape")
    return images, masks, num_pixels, hashlib.sha256(names + checksums.tobytes()).hexdigest()


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised uint8 values: in memory where it has room for twice as much, else in a file, mapped.

    The file has no name and goes with the process; its folder is the system's for temporary files (TMPDIR).
    """
    size = int(np.prod(shape))
    if 2 * size * processes.on_this_machine() < memory.free_bytes():
        return np.empty(shape, np.uint8)
    allocate = getattr(os, "posix_fallocate", lambda file, start, size: os.truncate(file, size))
    try:
        with tempfile.TemporaryFile() as file:
            allocate(file.fileno(), 0, size)  # a full disk must be an error here, not a crash in the mapping
            return np.memmap(file, np.uint8, "r+", shape=shape)
    except OSError as error:
        reason = f"{error.strerror}: {size >> 20} MiB for a split too large for memory; set TMPDIR to another folder"
        raise OSError(error.errno, reason, tempfile.gettempdir()) from None


def class_weights(num_pixels: np.ndarray, weighting: str = "sqrt") -> np.ndarray:
    """Weights per class (C,), with mean 1 over the classes present; a class never seen gets 1.

    num_pixels  (N, C) pixels per image and class
    weighting   "sqrt" 1/√f · "inverse" 1/f · "median" median(f)/f with f over the images that show the class (Eigen &
                Fergus, ICCV 2015) · "enet" 1/ln(1.02 + f) (Paszke et al., 2016) · "none" 1
    """
    total = num_pixels.sum(axis=0)
    present = total > 0
    if weighting == "median":
        images_with = (num_pixels > 0) * num_pixels.sum(axis=1, keepdims=True)
        share = (total / np.maximum(images_with.sum(axis=0), 1))[present]
    else:
        share = total[present] / total.sum()
    rules = {"sqrt": share**-0.5, "inverse": 1 / share, "median": np.median(share) / share}
    rules |= {"enet": 1 / np.log(1.02 + share), "none": np.ones_like(share)}
    weights = np.ones(len(total))
    weights[present] = rules[weighting] / rules[weighting].mean()
    return weights


def weights_table(dataset: SegmentationSet, weights: np.ndarray) -> str:
    """Each class's share of the pixels, weight, and share of the loss at equal error, as text."""
    share = dataset.num_pixels.sum(axis=0) / dataset.num_pixels.sum()
    mass = share * weights / (share * weights).sum()
    lines = [f"{'class':<16}{'pixels':>9}{'weight':>9}{'of the loss':>13}"]
    for name, *row in zip(dataset.class_set.names, share, weights, mass):
        lines.append(f"{name:<16}{row[0]:>8.1%} {row[1]:>8.2f}{row[2]:>12.1%}")
    return "\n".join(lines)


def instance_boxes(
    dataset: SegmentationSet, names: tuple[str, ...] | None = None, most: int = 16, smallest: int = 12
) -> tuple[Tensor, Tensor]:
    """Bounding boxes of the connected components of some classes (people by default), largest first.

    most, smallest  boxes kept per image, and pixels that a component must have
    Returns boxes (N, most, 4) float x0, y0, x1, y1 and their number per image (N,) int64.
    """
    known = dataset.class_set.names
    names = [name for name in PEOPLE if name in known] if names is None else names
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(f"classes to occlude: expected some of {', '.join(known)}; found {', '.join(sorted(unknown))}")
    wanted = [known.index(name) for name in names]
    boxes, num_boxes = np.zeros((len(dataset), most, 4), np.float32), np.zeros(len(dataset), np.int64)

    def find(row: int) -> None:
        found, mask = [], dataset.masks[row].numpy()
        for class_id in wanted:
            components = cv2.connectedComponentsWithStats((mask == class_id).astype(np.uint8))[2][1:]
            found += [c for c in components.tolist() if c[4] >= smallest]  # x, y, w, h, area
        found = sorted(found, key=lambda c: -c[4])[:most]
        num_boxes[row] = len(found)
        for place, (x, y, w, h, _) in enumerate(found):
            boxes[row, place] = x, y, x + w, y + h

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(find, range(len(dataset))))
    return torch.from_numpy(boxes), torch.from_numpy(num_boxes)
