"""Whether splits are what they say, judged as a whole: ids, pairing, colours, duplicates, neighbouring frames.

What cannot be right is an error; what may be is a warning, with the evidence.
"""

import re
from collections import Counter

import numpy as np

from ..classes import CLASS_SETS, IGNORE_INDEX, ClassSet
from ..files import UserError
from ..images import cv2
from ..processed import CAMVID
from .layouts import Layout

REACH, WIDTH = 24, 512  # steps by which a mask may be off, and the width at which that is looked for
GROUPS = ("road", "sidewalk", "building", "vegetation", "sky", "vehicle", "person")
USUAL = np.array([0.33, 0.055, 0.21, 0.145, 0.04, 0.066, 0.012])  # shares of the pixels in street scenes
SCHEMES = {  # by the default class set of a layout: the ids of GROUPS, the right ones first
    "cityscapes7": {
        "label ids": (7, 8, 11, 21, 23, 26, 24),
        "trainIds": (0, 1, 2, 8, 10, 13, 11),
        "label ids plus one": (8, 9, 12, 22, 24, 27, 25),
        "label ids minus one": (6, 7, 10, 20, 22, 25, 23),
        "CARLA's ids": (7, 8, 1, 9, 13, 10, 4),
        "CARLA's ids since 0.9.14": (1, 2, 3, 9, 11, 14, 12),
        "IDD's ids": (0, 3, 29, 32, 33, 12, 6),
        "IDD's level 3 ids": (0, 2, 22, 24, 25, 9, 4),
    },
    "camvid7": {
        "SegNet's ids": (3, 4, 1, 5, 0, 8, 9),
        "SegNet's ids plus one": (4, 5, 2, 6, 1, 9, 10),
        "SegNet's ids minus one": (2, 3, 0, 4, 255, 7, 8),
        "Cityscapes' trainIds": (0, 1, 2, 8, 10, 13, 11),
        "Cityscapes' label ids": (7, 8, 11, 21, 23, 26, 24),
    },
}


def fit(image: np.ndarray, labels: np.ndarray) -> tuple[float, float, int] | None:
    """By how many steps right and down the labels would fit the image's edges best, and the step in pixels;
    None where the labels have no edge, or the picture is small."""
    step = max(1, labels.shape[1] // WIDTH)
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), step / 2 + 0.5)
    grey, labels = grey[::step, ::step], labels[::step, ::step]
    strength = np.log1p(np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)))
    edges = np.zeros(labels.shape, np.float32)
    edges[:, 1:] += labels[:, 1:] != labels[:, :-1]
    edges[1:] += labels[1:] != labels[:-1]
    if not edges.any() or min(edges.shape) <= 2 * REACH:
        return None
    spectrum = np.fft.rfft2(strength - strength.mean()) * np.conj(np.fft.rfft2(edges > 0))
    scores = np.roll(np.fft.irfft2(spectrum, s=labels.shape), (REACH, REACH), (0, 1))[: 2 * REACH + 1, : 2 * REACH + 1]
    y, x = np.unravel_index(scores.argmax(), scores.shape)
    return float(x - REACH), float(y - REACH), step


def schemes_of(layout: Layout) -> dict:
    """The tables of ids that labels of a layout may have, the right one first; none for one's own classes."""
    return SCHEMES.get((*layout.class_sets, "")[0], {})


def sky_colour(image: np.ndarray, labels: np.ndarray, layout: Layout) -> float | None:
    """Mean of blue minus red in the sky, or None where there is little of it."""
    schemes = schemes_of(layout)
    sky = labels == next(iter(schemes.values()))[GROUPS.index("sky")] if schemes else np.zeros(labels.shape, bool)
    return float((image[sky][:, 2].astype(float) - image[sky][:, 0]).mean()) if sky.mean() > 0.005 else None


def judge_ids(split: str, layout: Layout, class_set: ClassSet, ids: dict[int, int]) -> list[str]:
    """Warnings about the ids of a split (pixels per source id). Raises UserError where they are another data set's."""
    total, said = sum(ids.values()), []
    schemes = schemes_of(layout)
    if schemes and class_set.name in CLASS_SETS:
        shares = {name: np.array([ids.get(i, 0) for i in row]) / total for name, row in schemes.items()}
        fits = {name: float(np.minimum(share, USUAL).sum() / USUAL.sum()) for name, share in shares.items()}
        own, best = next(iter(fits)), max(fits, key=fits.__getitem__)
        if fits[own] < 0.5 and fits[best] > fits[own] + 0.2:
            found = ", ".join(f"{group} {share:.1%}" for group, share in zip(GROUPS[:5], shares[own]))
            raise UserError(f"{split}: expected {own}, found what looks like {best}: as {own} it would have {found}")
    pixels = np.bincount(class_set.lookup[[*ids]], weights=[*ids.values()], minlength=IGNORE_INDEX + 1)
    per_class, void = dict(zip(class_set.names, pixels)), pixels[IGNORE_INDEX]
    if absent := [name for name, pixels in per_class.items() if not pixels]:
        said.append(f"no pixel of {', '.join(absent)}")
    if void > total / 2:
        said.append(f"{void / total:.0%} of the pixels are void")
    return said + [f"{n / total:.1%} of the pixels are {name}" for name, n in per_class.items() if n > 0.95 * total]


def judge_pairs(fits: list[tuple[float, float, int]], skies: list[float]) -> list[str]:
    """Warnings about images and masks that do not belong together, from `fit` and `sky_colour` of some pairs."""
    said, places = [], np.array(fits).reshape(-1, 3)
    if len(places) >= 4:
        middle = np.median(places[:, :2], axis=0)
        together = (np.abs(places[:, :2] - middle).max(axis=1) <= 1).mean()
        if together < 0.3:
            said.append(f"image and mask share their edges in {together:.0%} of {len(places)} pairs: are they pairs?")
        elif np.abs(middle).max() >= 2:
            x, y = middle * places[0, 2]
            share = f"{together:.0%} of {len(places)} pairs"
            said.append(f"in {share} the mask fits when moved by {x:+.0f}, {y:+.0f} pixels")
    if len(skies) >= 4 and np.mean(np.array(skies) < 0) > 0.7:
        said.append(f"in {np.mean(np.array(skies) < 0):.0%} of the images the sky is more red than blue: are they BGR?")
    return said


def judge_duplicates(images: dict[str, dict[str, str]]) -> tuple[list[str], list[str]]:
    """Errors and warnings about images that occur twice; images: split -> stem -> hash of the pixels."""
    errors, warnings = [], []
    for split, hashes in images.items():
        if twice := [key for key, number in Counter(hashes.values()).items() if number > 1]:
            pair = [stem for stem, key in hashes.items() if key == twice[0]][:2]
            warnings.append(f"{split}: {len(twice)} images occur more than once, such as {' and '.join(pair)}")
    names = list(images)
    for first, second in [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]:
        by_hash = {key: stem for stem, key in images[first].items()}
        if both := [(by_hash[key], stem) for stem, key in images[second].items() if key in by_hash]:
            what = f"{len(both)} images of {second} are in {first}, too, such as {both[0][1]} ({both[0][0]})"
            errors.append(f"{what}: scores on {second} would mean nothing; remove them from one split")
    return errors, warnings


def judge_frames(stems: dict[str, list[str]]) -> list[str]:
    """What must be said about splits that share a clip of CamVid; stems: those of each split."""
    clips: dict[str, dict[str, list[int]]] = {}
    for split, names in stems.items():
        for match in filter(None, (re.fullmatch(CAMVID, name) for name in names)):
            clips.setdefault(match[1], {}).setdefault(split, []).append(int(match[2]))
    said = []
    for clip, splits in clips.items():
        for split in sorted(splits.keys() - {"train"}) if "train" in splits else ():
            gap = min(np.abs(np.array(splits["train"]) - frame).min() for frame in splits[split])
            apart = f"{gap} apart ({gap / 30:.1f} s)"
            said.append(f"{split} and train share the clip {clip}: their nearest frames are {apart}")
    return said
