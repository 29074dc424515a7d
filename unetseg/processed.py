"""The processed folder on disk: which files make a split, and one pair of them, checked."""

import io
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from .classes import CLASS_SETS, IGNORE_INDEX, ClassSet
from .files import read_bytes, read_json
from .pictures import read_png


class NoSplit(ValueError):
    """The folder has no such split."""


@dataclass(frozen=True)
class Split:
    """Which files make up a split: the folder they lie in, their stems, and where the split comes from, in words."""

    name: str
    folder: str
    stems: list[str]
    note: str


def find_split(processed: Path, name: str) -> Split:
    """The files of a split, as DESIGN's rules cut them. Raises NoSplit, or ValueError for one that is damaged.

    Cityscapes' val is halved into test and val as scikit-learn's train_test_split(indices, test_size=0.5,
    random_state=42) does (first half returned = test). Without a val folder, a seeded fifth of train is held out.
    """
    known = next((f for f in ("train", "val", "test") if (processed / f"stats_{f}.json").is_file()), "train")
    layout, has_val = read_stats(processed, known)["layout"], (processed / "images_processed" / "val").is_dir()
    if name in ("train", "val") and not has_val:
        return _hold_out(name, _stems(processed, "train"))
    if layout == "cityscapes" and has_val and name in ("val", "test"):
        half = _half(name, _stems(processed, "val"))
        if half.stems:
            return half
    folder = "val" if name == "val_all" else name
    if not (processed / "images_processed" / folder).is_dir() or (layout == "cityscapes" and name == "test"):
        raise NoSplit(f"{processed}: expected a split {name!r}, found none; process it, or choose another split")
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
    except NoSplit:
        return "val"
    return "test"


def read_stats(processed: Path, folder: str) -> dict:
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
    listed = set(read_stats(processed, folder)["files"])
    problems = [f"{folder}/{stem}.npy: image without a mask" for stem in sorted(images - masks)]
    problems += [f"{folder}/{stem}.png: mask without an image" for stem in sorted(masks - images)]
    problems += [f"{folder}/{stem}: not in stats_{folder}.json" for stem in sorted((images & masks) - listed)]
    problems += [f"{folder}/{stem}: in stats_{folder}.json but not there" for stem in sorted(listed - images - masks)]
    if problems or not images:
        raise ValueError("\n".join([f"{processed}: expected pairs of image and mask; rerun preprocessing", *problems]))
    return sorted(images)


def read_pair(
    processed: Path, split: Split, stem: str, class_set: ClassSet, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """Image (H, W, 3) uint8, mask (H, W) uint8, pixels per class and void (C + 1,), CRC-32 of image file and mask.

    Raises ValueError naming a file.
    """
    mask_path = processed / "masks_processed" / split.folder / f"{stem}.png"
    image_path = processed / "images_processed" / split.folder / f"{stem}.npy"
    mask, texts = read_png(mask_path, "L")
    if mask.shape != size[::-1]:
        raise ValueError(f"{mask_path}: expected {size[::-1]}, found {mask.shape}")
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    bad = sorted({*np.flatnonzero(counts).tolist()} - {*range(len(class_set)), IGNORE_INDEX})
    if bad:
        raise ValueError(f"{mask_path}: expected values 0..{len(class_set) - 1} or {IGNORE_INDEX}, found {bad}")
    image, crc32 = read_image(image_path, (*size[::-1], 3), texts.get("unetseg"))
    return image, mask, np.append(counts[: len(class_set)], counts[IGNORE_INDEX]), (crc32, zlib.crc32(mask))


def read_image(path: Path, shape: tuple[int, ...], note: str | None) -> tuple[np.ndarray, int]:
    """A stored image as uint8, k from uint8 and from a float k/255, and its file's CRC-32. ValueError names the file.

    note  what preprocessing wrote into the mask; its checksum must be the file's
    """
    try:
        content = read_bytes(path, most=4 * math.prod(shape) + 4096)
        crc32 = zlib.crc32(content)
        expected = json.loads(note)["image_crc32"] if note else crc32
        stored = np.load(io.BytesIO(content), allow_pickle=False)
        found = stored.shape, stored.dtype.name
    except Exception as error:  # numpy names no common base for what damaged files raise
        reason = str(error).removeprefix(f"{path}: ") or type(error).__name__
        raise ValueError(f"{path}: expected the .npy array that preprocessing wrote, found {reason}") from None
    if found[0] != shape or found[1] not in ("uint8", "float16", "float32"):
        raise ValueError(f"{path}: expected {shape} float32, float16 or uint8, found {found[0]} {found[1]}")
    if stored.dtype != np.uint8 and not (stored.min() >= 0 and stored.max() <= 1):  # also true for NaN
        raise ValueError(f"{path}: expected values in [0, 1], found {stored.min()} to {stored.max()}")
    if crc32 != expected:
        raise ValueError(f"{path}: expected the array that preprocessing wrote, found another (wrong checksum)")
    return to_uint8(stored), crc32


def to_uint8(stored: np.ndarray) -> np.ndarray:
    """k (H, W, 3) uint8 from k/255 in a float dtype, or from k itself."""
    if stored.dtype == np.uint8:
        return stored
    levels = np.ascontiguousarray(stored, np.float32).reshape(len(stored), -1)
    return cv2.convertScaleAbs(levels, alpha=255).reshape(stored.shape)  # rounds, in one pass
