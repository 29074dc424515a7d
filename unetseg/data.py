"""The processed folder as data sets in memory: splits, checks, class frequencies and weights, batches."""

import io
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from .augment import epoch_draws
from .classes import CLASS_SETS, IGNORE_INDEX, ClassSet
from .files import read_bytes, read_json
from .pictures import read_png

PEOPLE = ("person", "rider", "pedestrian", "bicyclist")
WEIGHTINGS = ("sqrt", "inverse", "median", "enet", "none")


@dataclass(frozen=True)
class Split:
    """Which files make up a split: the folder they lie in, their stems, and where the split comes from, in words."""

    name: str
    folder: str
    stems: list[str]
    note: str


class SegmentationSet(Dataset):
    """One split in memory; item i is (image float32 (3, H, W) in [0, 1], mask int64 (H, W), 255 = void).

    images      (N, H, W, 3) uint8
    masks       (N, H, W) uint8 class ids; under void="background" void has become class 0
    num_pixels  (N, C) pixels per image and class in these masks
    """

    def __init__(
        self, split: Split, class_set: ClassSet, images: Tensor, masks: Tensor, num_pixels: np.ndarray
    ) -> None:
        self.split, self.class_set = split, class_set
        self.images, self.masks, self.num_pixels = images, masks, num_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.batch(torch.tensor([index]))
        return image[0], mask[0]

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) float32 in [0, 1] and masks (N, H, W) int64 of these indices, on `device`."""
        images, masks = self.images[indices].to(device), self.masks[indices].to(device)
        return images.permute(0, 3, 1, 2) / 255, masks.long()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.images.shape[2], self.images.shape[1]


@dataclass
class Batches:
    """The batches of a data set, epoch by epoch: in order as they are, or shuffled and augmented.

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
            indices = order[first : first + self.batch_size]
            images, masks = self.dataset.batch(indices, self.device)
            if self.augment is not None:
                images, masks = self.augment(images, masks, table[indices].to(self.device), indices)
            yield images, masks


def load_split(processed: Path, name: str, void: str = "ignore") -> SegmentationSet:
    """Read a split of the processed folder into memory.

    name  "train", "val", "test" or "val_all"
    Raises ValueError, naming every offender, for orphans, wrong shapes and types, and values outside the class set.
    """
    split = find_split(processed, name)
    stats = _stats(processed, split.folder)
    class_set = CLASS_SETS[stats["class_set"]]
    if void not in class_set.void_rules:
        raise ValueError(f"void rule: expected one of {class_set.void_rules} for {class_set.name}, found {void!r}")
    width, height = stats["size"]
    images = np.empty((len(split.stems), height, width, 3), np.uint8)
    masks = np.empty((len(split.stems), height, width), np.uint8)
    num_pixels, problems = np.empty((len(split.stems), len(class_set) + 1), np.int64), []
    for row, stem in enumerate(tqdm(split.stems, desc=f"reading {name}", unit="img", leave=False, delay=1)):
        try:
            images[row], masks[row], num_pixels[row] = _read_pair(processed, split, stem, class_set, (width, height))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join([f"{len(problems)} unusable files; rerun preprocessing:", *problems]))
    if void == "background":
        masks[masks == IGNORE_INDEX] = 0
        num_pixels[:, 0] += num_pixels[:, -1]
    return SegmentationSet(split, class_set, torch.from_numpy(images), torch.from_numpy(masks), num_pixels[:, :-1])


def find_split(processed: Path, name: str) -> Split:
    """The files of a split, as DESIGN's rules cut them. Raises ValueError when the folder has no such split.

    Cityscapes' val is halved into test and val as scikit-learn's train_test_split(indices, test_size=0.5,
    random_state=42) does (first half returned = test). Without a val folder, a seeded fifth of train is held out.
    """
    known = next((f for f in ("train", "val", "test") if (processed / f"stats_{f}.json").is_file()), "train")
    layout, has_val = _stats(processed, known)["layout"], (processed / "images_processed" / "val").is_dir()
    if name in ("train", "val") and not has_val:
        return _hold_out(name, _stems(processed, "train"))
    if layout == "cityscapes" and has_val and name in ("val", "test"):
        half = _half(name, _stems(processed, "val"))
        if half.stems:
            return half
    folder = "val" if name == "val_all" else name
    if not (processed / "images_processed" / folder).is_dir() or (layout == "cityscapes" and name == "test"):
        raise ValueError(f"{processed}: expected a split {name!r}, found none; process it, or choose another split")
    stems = _stems(processed, folder)
    return Split(name, folder, stems, f"all {len(stems)} {folder} images")


def _hold_out(name: str, stems: list[str]) -> Split:
    held_out = set(np.random.RandomState(42).permutation(len(stems))[: max(1, round(len(stems) / 5))].tolist())
    kept = [stem for place, stem in enumerate(stems) if (place in held_out) == (name == "val")]
    if not kept:
        raise ValueError(f"expected at least 2 training images to hold one out as val, found {len(stems)}")
    reason = "there is no val split, so a fifth of train is held out as val"
    return Split(name, "train", kept, f"{len(kept)} of {len(stems)} train images: {reason}")


def _half(name: str, stems: list[str]) -> Split:
    shuffled, num_val = np.random.RandomState(42).permutation(len(stems)), -(-len(stems) // 2)
    half = shuffled[:num_val] if name == "val" else shuffled[num_val:]
    return Split(name, "val", [stems[place] for place in half], f"{len(half)} of the {len(stems)} val images")


def scored_split(processed: Path) -> str:
    """The split that final scores are taken on: "test" where there is one, else "val"."""
    try:
        find_split(processed, "test")
    except ValueError:
        return "val"
    return "test"


def _stats(processed: Path, folder: str) -> dict:
    path = processed / f"stats_{folder}.json"
    if not path.is_file():
        raise ValueError(f"{path}: expected what preprocessing writes, found nothing; run preprocessing first")
    stats = read_json(path)
    size, files = stats.get("size"), stats.get("files")
    sound = {
        "layout": stats.get("layout") in ("cityscapes", "camvid"),
        "class_set": isinstance(stats.get("class_set"), str) and stats["class_set"] in CLASS_SETS,
        "size": isinstance(size, list) and len(size) == 2 and all(type(n) is int and 8 <= n <= 8192 for n in size),
        "files": isinstance(files, dict),
    }
    for key, good in sound.items():
        if not good:
            raise ValueError(f"{path}: expected what preprocessing writes, found {key} {stats.get(key)!r}; rerun it")
    return stats


def _stems(processed: Path, folder: str) -> list[str]:
    """Sorted stems of a folder whose images, masks and stats agree. Raises ValueError naming each that does not."""
    images = {path.stem for path in (processed / "images_processed" / folder).glob("*.npy")}
    masks = {path.stem for path in (processed / "masks_processed" / folder).glob("*.png")}
    listed = set(_stats(processed, folder)["files"])
    problems = [f"{folder}/{stem}.npy: image without a mask" for stem in sorted(images - masks)]
    problems += [f"{folder}/{stem}.png: mask without an image" for stem in sorted(masks - images)]
    problems += [f"{folder}/{stem}: not in stats_{folder}.json" for stem in sorted((images & masks) - listed)]
    problems += [f"{folder}/{stem}: in stats_{folder}.json but not there" for stem in sorted(listed - images - masks)]
    if problems or not images:
        raise ValueError("\n".join([f"{processed}: expected pairs of image and mask; rerun preprocessing", *problems]))
    return sorted(images)


def _read_pair(
    processed: Path, split: Split, stem: str, class_set: ClassSet, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8, mask (H, W) uint8, pixels per class and void (C + 1,). Raises ValueError naming a file."""
    mask_path = processed / "masks_processed" / split.folder / f"{stem}.png"
    image_path = processed / "images_processed" / split.folder / f"{stem}.npy"
    mask, texts = read_png(mask_path, "L")
    if mask.shape != size[::-1]:
        raise ValueError(f"{mask_path}: expected {size[::-1]}, found {mask.shape}")
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    bad = sorted({*np.flatnonzero(counts).tolist()} - {*range(len(class_set)), IGNORE_INDEX})
    if bad:
        raise ValueError(f"{mask_path}: expected values 0..{len(class_set) - 1} or {IGNORE_INDEX}, found {bad}")
    image = _read_image(image_path, (*size[::-1], 3), texts.get("unetseg"))
    return image, mask, np.append(counts[: len(class_set)], counts[IGNORE_INDEX])


def _read_image(path: Path, shape: tuple[int, ...], note: str | None) -> np.ndarray:
    """A stored image as uint8: k from uint8, and from a float k/255. Raises ValueError naming the file.

    note  what preprocessing wrote into the mask; its checksum must be the file's
    """
    try:
        content = read_bytes(path, most=4 * math.prod(shape) + 4096)
        crc32 = json.loads(note)["image_crc32"] if note else None
        stored = np.load(io.BytesIO(content), allow_pickle=False)
        found = stored.shape, stored.dtype.name
    except Exception as error:  # numpy names no common base for what damaged files raise
        reason = str(error).removeprefix(f"{path}: ") or type(error).__name__
        raise ValueError(f"{path}: expected the .npy array that preprocessing wrote, found {reason}") from None
    if found[0] != shape or found[1] not in ("uint8", "float16", "float32"):
        raise ValueError(f"{path}: expected {shape} float32, float16 or uint8, found {found[0]} {found[1]}")
    if stored.dtype != np.uint8 and not (stored.min() >= 0 and stored.max() <= 1):  # also true for NaN
        raise ValueError(f"{path}: expected values in [0, 1], found {stored.min()} to {stored.max()}")
    if crc32 is not None and crc32 != zlib.crc32(content):
        raise ValueError(f"{path}: expected the array that preprocessing wrote, found another (wrong checksum)")
    return stored if stored.dtype == np.uint8 else np.rint(stored * np.float32(255)).astype(np.uint8)


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
    for row, mask in enumerate(dataset.masks.numpy()):
        found = []
        for class_id in wanted:
            components = cv2.connectedComponentsWithStats((mask == class_id).astype(np.uint8))[2][
                1:
            ]  # x, y, w, h, area
            found += [c for c in components.tolist() if c[4] >= smallest]
        found = sorted(found, key=lambda c: -c[4])[:most]
        num_boxes[row] = len(found)
        for place, (x, y, w, h, _) in enumerate(found):
            boxes[row, place] = x, y, x + w, y + h
    return torch.from_numpy(boxes), torch.from_numpy(num_boxes)
