"""The processed folder on disk: which files make up a split, and one pair of image and mask, checked."""

import hashlib
import io
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .classes import IGNORE_INDEX
from .files import UserError, read_bytes, read_json
from .images import cv2, read_png

FORMAT = 2  # of stats_<split>.json
FOLDS, GAP = 4, 10  # parts of train, each held out in turn; seconds between a part and what is trained on
CITYSCAPES, CAMVID = r"([a-z-]+)_(\d{6})_(\d{6})", r"(\d{4}[A-Z]\w|Seq\w+)_f?(\d+)"


class NoSplit(UserError):
    """The folder has no such split."""


@dataclass(frozen=True)
class Split:
    """Which files make up a split: those of `folder` whose stems are in `checked`, with the CRC-32 of the decoded image
    and mask as preprocessing recorded it; `note` says where the split comes from."""

    name: str
    folder: str
    checked: dict[str, int]
    note: str

    @property
    def images(self) -> list[str]:
        """The images by folder and stem, which may repeat a name from another folder."""
        return [f"{self.folder}/{stem}" for stem in self.checked]

    @property
    def sha256(self) -> str:
        """Fingerprint of names and decoded pixels; the same for every stored dtype."""
        return hashlib.sha256(repr(sorted(self.checked.items())).encode()).hexdigest()


def moment(stem: str) -> tuple[str, float] | None:
    """The clip of an image and its second there, by its name; None where the name tells no time. Cityscapes' cities are
    one long clip (17 frames a second) or sequences of 30 frames, of which neighbouring numbers are neighbours."""
    if (match := re.fullmatch(CITYSCAPES, stem)) and match[1] != "drawn":
        alone = match[3] == "000019"
        return (match[1], int(match[2]) * 30 / 17) if alone else (match[1] + match[2], int(match[3]) / 17)
    match = re.fullmatch(CAMVID, stem)
    return (match[1], int(match[2]) / 30) if match else None


def hold_out(stems: list[str], part: int, parts: int) -> tuple[list[str], list[str], bool]:
    """The stems of one of `parts` equal parts, those to train on without it, and whether the parts are of time.

    A part is a stretch of every clip, and frames within GAP seconds of it are left out of training: neighbouring
    frames are nearly the same picture. Clips too short for that go to a part as a whole. Where names tell no time, or
    too little of it, the parts are drawn at random, with a fixed seed.
    """
    clips: dict[str, list[tuple[float, str]]] = {}
    for found, stem in sorted((moment(stem) or ("", -1.0), stem) for stem in stems):
        clips.setdefault(found[0], []).append((found[1], stem))
    held, kept = [], []
    for number, frames in enumerate(clips.values()):
        if frames[-1][0] - frames[0][0] < parts * GAP:
            (held if number % parts == part else kept).extend(stem for _, stem in frames)
            continue
        inside = [frame for place, frame in enumerate(frames) if place * parts // len(frames) == part]
        held += [stem for _, stem in inside]
        kept += [stem for t, stem in frames if not inside[0][0] - GAP < t < inside[-1][0] + GAP]
    if held and kept and "" not in clips:
        return held, kept, True
    chosen = np.random.RandomState(42).permutation(len(stems)) * parts // len(stems) == part
    return *([s for s, inside in zip(stems, chosen) if inside == wanted] for wanted in (True, False)), False


def find_split(processed: Path, name: str) -> Split:
    """The files of "train", "val", "test" or "val_all", or of "fold<k>" and "not_fold<k>": a quarter of train, and
    what is trained on to be scored there. Raises NoSplit.

    Where val is halved (Cityscapes), test and val are cut as scikit-learn's train_test_split(indices, test_size=0.5,
    random_state=42) does (first half returned = test). Without a val folder, a fifth of train is held out.
    """
    has_val = (processed / "stats_val.json").is_file()
    halved = has_val and read_stats(processed, "val")["val_is_halved"]
    fold = re.fullmatch(rf"(not_)?fold([0-{FOLDS - 1}])", name)
    folder = "val" if name == "val_all" or (halved and name == "test") else name
    folder = "train" if fold or (name == "val" and not has_val) else folder
    if not (processed / f"stats_{folder}.json").is_file():
        hint = "" if list(processed.glob("stats_*.json")) else "; is this a processed folder? Run preprocessing first"
        raise NoSplit(f"{processed}: expected the split {name!r}, found no stats_{folder}.json{hint}")
    files = read_stats(processed, folder)["files"]
    stems, note = sorted(files), f"all {len(files)} {folder} images"
    if fold or (name in ("train", "val") and not has_val):
        held, kept, timed = hold_out(stems, int(fold[2]), FOLDS) if fold else hold_out(stems, 0, 5)
        share = f"fold {fold[2]} of {FOLDS}" if fold else "no val split, so a fifth of train is held out as val"
        how = f"whole stretches of time, {GAP} s apart from training" if timed else "at random"
        stems = kept if name == "train" or name.startswith("not") else held
        note = f"{len(stems)} of {len(files)} train images: {share} ({how})"
    elif halved and name in ("val", "test"):
        shuffled, num_val = np.random.RandomState(42).permutation(len(stems)), -(-len(stems) // 2)
        stems = [stems[place] for place in (shuffled[:num_val] if name == "val" else shuffled[num_val:])]
        note = f"{len(stems)} of the {len(files)} val images"
    if not stems:
        raise NoSplit(f"{processed}: too few images for the split {name!r}; found {len(files)} in {folder}")
    return Split(name, folder, {stem: files[stem]["crc32"] for stem in stems}, note)


def training_splits(fold: int | None) -> tuple[str, str]:
    """The names of what a run is trained on, and of what its val scores are taken on."""
    return ("train", "val") if fold is None else (f"not_fold{fold}", f"fold{fold}")


def scored_split(processed: Path, fold: int | None = None) -> str:
    """The split for final scores: the fold that was held out, else "test" where there is one, else "val"."""
    try:
        return find_split(processed, "test").name if fold is None else f"fold{fold}"
    except NoSplit:
        return "val"


def read_stats(processed: Path, folder: str) -> dict:
    """stats_<folder>.json. Raises UserError when it is not what preprocessing writes."""
    path = processed / f"stats_{folder}.json"
    stats = read_json(path)
    if stats.get("format") != FORMAT:
        raise UserError(f"{path}: was written by another version of unetseg; run preprocessing into a new folder")
    return stats


def pair_paths(processed: Path, folder: str, stem: str) -> tuple[Path, Path]:
    """Where an image and its mask lie."""
    image, mask = processed / "images_processed" / folder, processed / "masks_processed" / folder
    return image / f"{stem}.npy", mask / f"{stem}.png"


def read_pair(processed: Path, folder: str, stem: str, num_classes: int, size: tuple[int, int]) -> tuple:
    """Image (H, W, 3) uint8, mask (H, W) uint8, pixels per class with void last (C + 1,) int64, and their CRC-32.
    Raises UserError naming a file that is damaged or has another shape, type or range."""
    image_path, mask_path = pair_paths(processed, folder, stem)
    image, mask = read_image(image_path, (*size[::-1], 3)), read_png(mask_path, "L")
    if mask.shape != size[::-1]:
        raise UserError(f"{mask_path}: expected {size[::-1]}, found {mask.shape}")
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    if bad := sorted({*np.flatnonzero(counts).tolist()} - {*range(num_classes), IGNORE_INDEX}):
        raise UserError(f"{mask_path}: expected values 0..{num_classes - 1} or {IGNORE_INDEX}, found {bad}")
    return image, mask, np.append(counts[:num_classes], counts[IGNORE_INDEX]), checksum(image, mask)


def read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A stored image as k (H, W, 3) uint8, from k itself or from k/255 in a float dtype. Raises UserError."""
    content = io.BytesIO(read_bytes(path, most=4 * math.prod(shape) + 4096))
    try:
        stored = np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:  # NumPy has no common base class for the errors of damaged files
        raise UserError(f"{path}: expected an array that preprocessing wrote, found {error}; rerun it") from None
    if stored.shape != shape or stored.dtype.name not in ("uint8", "float16", "float32"):
        raise UserError(f"{path}: expected {shape} float32, float16 or uint8, found {stored.shape} {stored.dtype.name}")
    if stored.dtype == np.uint8:
        return np.ascontiguousarray(stored)
    if not (stored.min() >= 0 and stored.max() <= 1):  # also true for NaN
        raise UserError(f"{path}: expected values in [0, 1], found {stored.min()} to {stored.max()}")
    levels = np.ascontiguousarray(stored, np.float32).reshape(len(stored), -1)
    return cv2.convertScaleAbs(levels, alpha=255).reshape(shape)  # rounds, in one pass


def checksum(image: np.ndarray, mask: np.ndarray | None) -> int:
    """CRC-32 of the pixels of a pair, or of an image without a mask."""
    return zlib.crc32(image) if mask is None else zlib.crc32(mask, zlib.crc32(image))
