"""Raw data sets on disk: how each layout is recognised, its splits and pairs, and how its files are read.

To add a data set, write its class file into class_sets/ and a Layout with `find` into LAYOUTS below.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np

from ..classes import CLASS_SETS, ClassSet
from ..files import UserError, read_bytes
from ..images import BadFile, read_pixels
from ..processed import CAMVID

DEEPEST = 8  # folders below the given one that are looked into
JUNK = re.compile(r"\._.*|\.DS_Store|Thumbs\.db|desktop\.ini", re.IGNORECASE)  # files of operating systems
SKIPPED = re.compile(r"\..*|__MACOSX|wandb|(images|masks)_processed|visualizations")  # folders that hold no raw data
PICTURE = r"\.(?:png|jpe?g)"
ANY_PICTURE = re.compile(rf"{PICTURE}$|\.npy$", re.IGNORECASE)
ARCHIVE = re.compile(r"\.(zip|tar|t?gz|7z|rar)$", re.IGNORECASE)
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLITS |= {"train_extra": "train_extra"}
VOID_COLOUR = 254  # in place of a colour that no class has
NEAR, CLEAR = 40, 8  # distances in RGB: of a JPEG's colour to its class, and how much farther the next one is

TRAIN_IDS = np.zeros(256, np.uint8)  # Cityscapes' trainId -> label id; void is 0, "unlabeled"
TRAIN_IDS[:19] = [np.flatnonzero(CLASS_SETS["cityscapes19"].lookup == c)[0] for c in range(19)]
CITYSCAPES_COLOURS = {tuple(CLASS_SETS["cityscapes19"].colours[c].tolist()): int(TRAIN_IDS[c]) for c in range(19)}
CITYSCAPES_COLOURS |= {(0, 0, 0): 0, (111, 74, 0): 5, (81, 0, 81): 6, (250, 170, 160): 9, (230, 150, 140): 10}
CITYSCAPES_COLOURS |= {(180, 165, 180): 14, (150, 100, 100): 15, (150, 120, 90): 16, (0, 0, 90): 29, (0, 0, 110): 30}
CAMVID_32 = """
Animal 64 128 64 9, Archway 192 0 128 1, Bicyclist 0 128 192 10, Bridge 0 128 64 1, Building 128 0 0 1,
Car 64 0 128 8, CartLuggagePram 64 0 192 9, Child 192 128 64 9, Column_Pole 192 192 128 2, Fence 64 64 128 7,
LaneMkgsDriv 128 0 192 3, LaneMkgsNonDriv 192 0 64 3, Misc_Text 128 128 64 6, MotorcycleScooter 192 0 192 10,
OtherMoving 128 64 64 8, ParkingBlock 64 192 128 4, Pedestrian 64 64 0 9, Road 128 64 128 3,
RoadShoulder 128 128 192 4, Sidewalk 0 0 192 4, SignSymbol 192 128 128 6, Sky 128 128 128 0,
SUVPickupTruck 64 128 192 8, TrafficCone 0 0 64 2, TrafficLight 0 64 64 6, Train 192 64 128 8, Tree 128 128 0 5,
Truck_Bus 192 128 192 8, Tunnel 64 0 64 1, VegetationMisc 192 192 0 5, Void 0 0 0 11, Wall 64 192 0 1"""
CAMVID_ROWS = [tuple(map(int, row.split()[1:])) for row in CAMVID_32.split(",")]  # by id 0-31: colour, SegNet's id


@dataclass(frozen=True)
class Pair:
    """One image with its label file; `labels` is None where the split has no labels worth reading."""

    stem: str
    image: Path
    labels: Path | None


@dataclass
class Files:
    """The images or the label files of a split: the folder below which they lie, and the paths of each stem."""

    top: Path
    by_stem: dict[str, list[Path]] = field(default_factory=dict)


@dataclass
class DataSet:
    """A raw data set as it was found: the images and label files of each split, and what must be said about it."""

    layout: "Layout"
    root: Path
    splits: dict[str, tuple[Files, Files]]
    notes: list[str] = field(default_factory=list)
    class_file: Path | None = None

    def pairs(self, split: str) -> tuple[list[Pair], dict[str, str]]:
        """The split's pairs, and by stem what is wrong with each file that has no partner or several."""
        images, labels = self.splits[split]
        labelled, pairs, problems = split not in self.layout.unlabelled, [], {}
        for stem in sorted(images.by_stem.keys() | (labels.by_stem.keys() if labelled else set())):
            image, label = images.by_stem.get(stem, []), labels.by_stem.get(stem, []) if labelled else []
            if problem := self._problem(stem, image, label, labelled, (images.top, labels.top)):
                problems[stem] = problem
            else:
                pairs.append(Pair(stem, image[0], label[0] if labelled else None))
        return pairs, problems

    def quick_size(self) -> tuple[int, int]:
        """Width and height for a quick run: the shape of the images, few pixels."""
        found = readable(self.splits, 0, self.layout.read_image)
        height, width = found[0].shape[:2] if found else (256, 256)
        small = 64 * max(1, round((32768 * width / height) ** 0.5 / 64))
        return small, round(small * height / width)

    def _problem(self, stem: str, image: list[Path], label: list[Path], labelled: bool, tops: tuple[Path, Path]) -> str:
        """What is wrong with files that do not make a pair, or lie in the folders of two cities, or ""."""
        if not stem:
            return f"{(image + label)[0]}: expected a name before its ending, found none"
        for paths in (image, label):
            if len(paths) > 1:
                return f"{paths[0]}: expected one file of this name in the split, found also {paths[1]}"
        if not image:
            return f"{label[0]}: expected an image of the same name, found none"
        if labelled and not label:
            return f"{image[0]}: expected its label file {self.layout.label_name(stem)}, found none"
        if label and tops[0] != tops[1]:
            here, there = image[0].parent.relative_to(tops[0]), label[0].parent.relative_to(tops[1])
            if Path() not in (here, there) and here != there:
                return f"{label[0]}: expected it in {here}/ as its image {image[0].name}, found it in {there}/"
        return ""


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, without junk; none where it may not be read."""
    _, folders, files = next(os.walk(folder), ("", [], []))
    odd = {name for name in folders if name.endswith((".png", ".jpg"))}  # named as if they were no files
    folders = sorted(name for name in folders if name not in odd and not SKIPPED.fullmatch(name))
    return folders, sorted(name for name in [*files, *odd] if not JUNK.fullmatch(name))


class Tree(dict):
    """The folders below a root, the upper ones first, each with the names of its folders and of its files. Left out:
    what systems leave behind, what preprocessing and training wrote, and this repository."""

    def __init__(self, root: Path) -> None:
        self.root, level = root, [root]
        for _ in range(DEEPEST + 1):
            below: list[Path] = []
            for folder in level:
                ours = os.path.isfile(folder / "unetseg" / "run.py")
                circle = os.path.realpath(folder) in map(os.path.realpath, folder.parents)
                if folder == root or not (ours or circle):
                    self[folder] = list_folder(folder)
                    below += [folder / name for name in self[folder][0]]
            level = below

    def split_folders(self, top: Path) -> dict[str, Path]:
        """The folders of `top` that are named like a split, by the split's usual name."""
        return {SPLITS[name.lower()]: top / name for name in self[top][0] if name.lower() in SPLITS}

    def files(self, top: Path, ending: str, deep: bool = True) -> Files:
        """The files in a folder, and below it, whose names end as the pattern says, in any case."""
        pattern, found = re.compile(f"(.*?){ending}", re.IGNORECASE | re.DOTALL), Files(top)
        for path in [path for path in self if path == top or (deep and top in path.parents)]:
            for name in self[path][1]:
                if match := pattern.fullmatch(name):
                    found.by_stem.setdefault(match[1], []).append(path / name)
        return found


class Layout:
    """Where a data set keeps its files, and what they mean. A subclass has `find`, which yields the data sets of this
    layout in a Tree, and overrides what is different.

    expected       the layout in words, for error messages
    class_sets     names in CLASS_SETS that its ids can become, the default first; none: its class file says
    unlabelled     splits of which images alone are taken
    val_is_halved  whether val is cut into val and test
    """

    name, expected = "", ""
    class_sets: tuple[str, ...] = ("cityscapes7", "cityscapes19")
    unlabelled: tuple[str, ...] = ()
    val_is_halved = False

    def label_name(self, stem: str) -> str:
        return f"{stem}.png"

    def read_image(self, path: Path, content: bytes) -> np.ndarray:
        """(H, W, 3) uint8 RGB. Raises BadFile."""
        image = read_pixels(path, content)
        if image.ndim == 2:
            raise BadFile(f"{path}: expected an 8-bit RGB image (mode RGB), found one channel (mode L)")
        return image

    def read_labels(self, path: Path, content: bytes, class_set: ClassSet) -> np.ndarray:
        """(H, W) uint8 source ids. Raises BadFile."""
        labels = read_mask(path, content)
        if labels.ndim == 3:
            raise BadFile(f"{path}: expected 8-bit single-channel ids (mode L), found mode RGB")
        return labels


class Cityscapes(Layout):
    """Cityscapes' own layout, with images re-encoded or in images/, with or without folders of cities; its two archives
    may lie apart. Label files are those of label ids or, where there are none, of trainIds or colours."""

    def __init__(self, coarse: bool = False) -> None:
        self.kind = "gtCoarse" if coarse else "gtFine"

    name, expected = "cityscapes", "leftImg8bit/ and gtFine/ (Cityscapes)"
    unlabelled, val_is_halved = ("test",), True  # the published labels of test are dummies

    def find(self, tree):
        tops = [path for path in tree if tree.split_folders(path)]
        images = [path for path in tops if path.name.lower() in ("leftimg8bit", "images")]
        for labels in [path for path in tops if path.name.lower() == self.kind.lower()]:
            if not images:
                return
            nearest = max(images, key=lambda path: len(os.path.commonpath([path, labels])))
            images.remove(nearest)
            yield self._data_set(tree, nearest, labels)

    def _data_set(self, tree, images, labels):
        for used in ("labelIds", "labelTrainIds", "color", "labelIds"):
            ending, folders = f"_{self.kind}_{used}{PICTURE}", tree.split_folders(labels)
            found = {split: tree.files(top, ending) for split, top in folders.items()}
            if any(files.by_stem for files in found.values()):
                break
        image_folders, splits = tree.split_folders(images), {}
        for split in image_folders | folders:
            top, none = image_folders.get(split, images / split), Files(labels / split)
            splits[split] = tree.files(top, f"(?:_leftImg8bit)?{PICTURE}"), found.get(split, none)
        notes = [] if used == "labelIds" else [f"no files of label ids: the labels are decoded from {self.kind}_{used}"]
        notes += ["trainIds leave out parking, guard rail, bridge and others, which are void here"] * (used[5:6] == "T")
        return DataSet(self, Path(os.path.commonpath([images, labels])), splits, notes)

    def label_name(self, stem):
        return f"{stem}_{self.kind}_labelIds.png"

    def read_labels(self, path, content, class_set):
        if path.name.lower().endswith("_color.png"):
            return decode(read_mask(path, content), CITYSCAPES_COLOURS, path)
        ids = super().read_labels(path, content, class_set)
        return TRAIN_IDS[ids] if path.name.lower().endswith("trainids.png") else ids


class ImagePairs(Layout):
    """Kaggle's cityscapes-image-pairs: {train,val}/N.jpg, the photo in the left half, gtFine's colours in the right."""

    name, expected, val_is_halved = "cityscapes-image-pairs", "{train,val}/N.jpg, photo and colours side by side", True

    def find(self, tree):
        for path in tree:
            splits = {s: tree.files(top, r"\.jpe?g", deep=False) for s, top in tree.split_folders(path).items()}
            splits = {split: (files, files) for split, files in splits.items() if files.by_stem}
            stems = [stem for files, _ in splits.values() for stem in files.by_stem]
            if stems and all(stem.isdigit() for stem in stems) and self.looks_right(splits):
                notes = ["labels are decoded from JPEG colours: exact inside regions, void where colours blend"]
                yield DataSet(self, path, splits, [*notes, "the photos were squashed to 256x256 by their publisher"])

    def looks_right(self, splits):
        """Whether images are twice as wide as high, and the right halves have gtFine's colours, but not the left."""
        found = readable(splits, 0, read_pixels)
        if not found or any(image.shape != (len(image), 2 * len(image), 3) for image in found):
            return False
        halves = (np.split(image, 2, axis=1) for image in found)
        shares = [[(nearest_colours(half, near=12) > 0).mean() for half in pair] for pair in halves]
        left, right = np.mean(shares, axis=0)
        return right > 0.5 and left < right / 2

    def read_image(self, path, content):
        image = super().read_image(path, content)
        return np.ascontiguousarray(image[:, : image.shape[1] // 2])

    def read_labels(self, path, content, class_set):
        image = super().read_image(path, content)
        return nearest_colours(image[:, image.shape[1] // 2 :])


class CamVid(Layout):
    """CamVid as SegNet has it: {split}/ and {split}annot/, with ids 0-11."""

    name, expected = "camvid", "train/ and trainannot/ (CamVid, SegNet's split)"
    class_sets = ("camvid7", "camvid11")
    beside = "annot"

    def find(self, tree):
        for path, (folders, _) in tree.items():
            tops = {split: (top, path / (top.name + self.beside)) for split, top in tree.split_folders(path).items()}
            if any(labels.name in folders for _, labels in tops.values()):
                yield DataSet(self, path, {split: self.sides(tree, *sides) for split, sides in tops.items()})

    def sides(self, tree, images, labels):
        return tree.files(images, PICTURE, deep=False), tree.files(labels, f"(?:_L|_P)?{PICTURE}", deep=False)


class CamVidColours(CamVid):
    """CamVid in its 32 classes: Kaggle's copies, the original, fastai's; cut into SegNet's split by frame numbers."""

    def __init__(self, given_split: bool = False) -> None:
        self.given_split = given_split

    name, expected = "camvid32", "train/ and train_labels/, or 701_StillsRaw_full/ and LabeledApproved_full/ (CamVid)"
    beside = "_labels"

    def find(self, tree):
        yield from (self.data_set(found.root, found.splits) for found in super().find(tree))
        for path, (folders, files) in tree.items():
            labels = [other for other in tree if other.name == "LabeledApproved_full" and tree[other][1]]
            if path.name == "701_StillsRaw_full" and tree[path][1] and labels:
                nearest = max(labels, key=lambda other: len(os.path.commonpath([path, other])))
                yield self.data_set(Path(os.path.commonpath([path, nearest])), {"": self.sides(tree, path, nearest)})
            elif "codes.txt" in files and {"images", "labels"} <= set(folders):
                yield self.data_set(path, {"": self.sides(tree, path / "images", path / "labels")})

    def data_set(self, root, splits):
        if self.given_split and "" not in splits:
            said = "the given split, which mixes neighbouring frames: scores are far too high and compare with nothing"
            return DataSet(self, root, splits, [said])
        cut = {split: (Files(root), Files(root)) for split in ("train", "val", "test")}
        for sides in splits.values():
            for place, files in enumerate(sides):
                for stem, paths in files.by_stem.items():
                    cut[segnet_split(stem)][place].by_stem.setdefault(stem, []).extend(paths)
        cut = {split: sides for split, sides in cut.items() if sides[0].by_stem}
        number = sum(len(images.by_stem) for images, _ in cut.values())
        said = f"{number} frames pooled, and cut into SegNet's train, val and test by their numbers"
        mixed = "; the given split mixes neighbouring frames (--given-split keeps it)" if "" not in splits else ""
        return DataSet(self, root, cut, [said + mixed])

    def read_labels(self, path, content, class_set):
        labels = read_mask(path, content, indexed=path.stem.endswith("_P"))
        colours = {row[:3] if labels.ndim == 3 else (id_,) * 3: row[3] for id_, row in enumerate(CAMVID_ROWS)}
        return decode(labels, colours, path)


class Folders(Layout):
    """Folders of images and of masks, with folders of splits above them, below them, or not at all: one's own data."""

    name, expected = "folders", "images/ and masks/ with a classes.toml (one's own)"
    class_sets = ()
    images = ("images", "image", "img", "imgs", "jpegimages")
    masks = ("masks", "mask", "labels", "label", "annotations", "segmentationclass", "segmentation")
    endings = PICTURE, f"(?:_mask|_label|_L)?{PICTURE}"

    def find(self, tree):
        for path, (_, files) in tree.items():
            splits = self.sides(tree, path)
            for split, top in tree.split_folders(path).items():
                inner = self.sides(tree, top) or self.beside(tree, top)
                splits |= {split: inner[""]} if "" in inner else {}
            if "" in splits:
                splits = {"train": splits[""]}
            class_file = path / "classes.toml" if "classes.toml" in files else None
            if any(all(side.by_stem for side in sides) for sides in splits.values()) and self.takes(splits, class_file):
                yield DataSet(self, path, splits, [], class_file)

    def sides(self, tree, path):
        """The images and masks in two folders of `path`, by the folders of splits in them, or under "" without any."""
        here = {name.lower(): path / name for name in tree[path][0]}
        tops = [next((here[name] for name in names if name in here), None) for names in (self.images, self.masks)]
        if None in tops:
            return {}
        inner, splits = [tree.split_folders(top) for top in tops], {}
        for split in sorted(inner[0] | inner[1]) or [""]:
            images, masks = splits[split] = tuple(
                tree.files(folders.get(split, top / split) if folders else top, ending, deep=bool(folders) or not split)
                for top, folders, ending in zip(tops, inner, self.endings)
            )
            if inner[0] and not inner[1]:  # all masks in one folder: each split takes those of its images
                masks.by_stem = {stem: paths for stem, paths in masks.by_stem.items() if stem in images.by_stem}
        return splits

    def beside(self, tree, top):
        """Images and masks side by side in one folder, N.jpg and N_mask.png, as Roboflow exports them."""
        images, masks = (tree.files(top, ending, deep=False) for ending in (rf"(?<!_mask){PICTURE}", r"_mask\.png"))
        return {"": (images, masks)} if masks.by_stem and self.name == "folders" else {}

    def takes(self, splits, class_file):
        return True

    def label_name(self, stem):
        return f"{stem}.png among the masks"

    def read_image(self, path, content):
        image = read_pixels(path, content)
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

    def read_labels(self, path, content, class_set):
        if not class_set.palette:
            return super().read_labels(path, content, class_set)
        return decode(read_mask(path, content, indexed=False), class_set.palette, path)


class Kitti(Folders):
    """KITTI's semantic benchmark: training/{image_2,semantic}, with Cityscapes' label ids."""

    name, expected, class_sets = "kitti", "training/image_2/ and training/semantic/ (KITTI)", Layout.class_sets
    images = ("image_2",)
    masks = ("semantic",)


class ColourFolders(Folders):
    """Folders of images and of masks in exactly gtFine's colours, as Kaggle's smaller copies of Cityscapes."""

    name, expected = "cityscapes-colours", "{train,val}/{img,label}/N.png in gtFine's colours (Cityscapes)"
    class_sets, val_is_halved = Layout.class_sets, True

    def takes(self, splits, class_file):
        """Whether some masks have no colour but gtFine's, and not void's alone."""
        seen = set()
        for labels in [] if class_file else readable(splits, 1, lambda *file: read_mask(*file, indexed=False)):
            seen |= set(np.unique(look_up(labels, CITYSCAPES_COLOURS))) if labels.ndim == 3 else {VOID_COLOUR}
        return len(seen) > 2 and VOID_COLOUR not in seen

    def read_labels(self, path, content, class_set):
        return decode(read_mask(path, content, indexed=False), CITYSCAPES_COLOURS, path)


class Arrays(Folders):
    """NumPy arrays: {split}/{image,label}/N.npy, images float in [0, 1], labels trainIds with -1 or 255 as void."""

    name, expected = "cityscapes-arrays", "{train,val}/{image,label}/N.npy (Cityscapes as arrays)"
    class_sets, val_is_halved, endings = Layout.class_sets, True, (r"\.npy", r"\.npy")

    def read_image(self, path, content):
        image = read_array(path, content)
        sound = image.ndim == 3 and image.shape[2] == 3 and image.size and image.dtype.kind == "f"
        if not sound or not 0 <= image.min() <= image.max() <= 1:
            raise BadFile(f"{path}: expected (H, W, 3) floats in [0, 1], found {image.shape} {image.dtype}")
        return np.round(image * 255).astype(np.uint8)

    def read_labels(self, path, content, class_set):
        labels = read_array(path, content)
        whole = labels.squeeze() if labels.dtype.kind in "iuf" else np.zeros(0)
        if whole.ndim != 2 or not np.isin(whole, [-1, 255, *range(19)]).all():
            raise BadFile(f"{path}: expected trainIds (H, W) from -1 to 18, found {labels.shape} {labels.dtype}")
        return TRAIN_IDS[whole.astype(np.int64) & 255]


def read_mask(path: Path, content: bytes, indexed: bool = True) -> np.ndarray:
    """Ids (H, W) or colours (H, W, 3) of a label file, uint8. Raises BadFile."""
    if content[:2] == b"\xff\xd8":
        raise BadFile(f"{path}: expected a PNG file of labels, found JPEG, which changes their values; export PNG")
    return read_pixels(path, content, indexed)


def read_array(path: Path, content: bytes) -> np.ndarray:
    try:
        return np.asarray(np.lib.format.read_array(BytesIO(content), allow_pickle=False))
    except Exception as error:  # NumPy has no common base class for the errors of damaged files
        raise BadFile(f"{path}: expected a NumPy array, found {error}") from None


def readable(splits: dict[str, tuple[Files, Files]], side: int, read) -> list[np.ndarray]:
    """Up to five readable images (side 0) or label files (1) of a data set, evenly spread; bad ones are told later."""
    paths, found = [paths[0] for sides in splits.values() for paths in sides[side].by_stem.values()], []
    for path in paths[:: 1 + len(paths) // 5]:
        with suppress(UserError):
            found.append(read(path, read_bytes(path)))
    return found


@lru_cache(maxsize=4)
def _colour_table(colours: tuple) -> np.ndarray:
    table = np.full(1 << 24, VOID_COLOUR, np.uint8)
    for (red, green, blue), id_ in colours:
        table[red << 16 | green << 8 | blue] = id_
    return table


def look_up(rgb: np.ndarray, colours: dict) -> np.ndarray:
    """Colours (H, W, 3), or grey values (H, W), -> ids (H, W) uint8, VOID_COLOUR for an unknown one."""
    red, green, blue = np.broadcast_to(np.atleast_3d(rgb), (*rgb.shape[:2], 3)).astype(np.uint32).transpose(2, 0, 1)
    return _colour_table(tuple(colours.items())).take(red << 16 | green << 8 | blue)


def decode(rgb: np.ndarray, colours: dict, path: Path) -> np.ndarray:
    """The ids of exact colours. Raises BadFile naming the unknown ones."""
    ids = look_up(rgb, colours)
    if (unknown := ids == VOID_COLOUR).any():
        found = np.unique(rgb[unknown].reshape(unknown.sum(), -1), axis=0)
        shown = f"{found[:3].tolist()}{' and others' if len(found) > 3 else ''} ({unknown.mean():.1%} of the pixels)"
        raise BadFile(f"{path}: expected colours of the class table, found {shown}")
    return ids


@lru_cache(maxsize=2)
def _nearest_table(near: int) -> np.ndarray:
    """Label ids of RGB colours in 64 steps a channel; 0 where no colour is near, or two are about as near."""
    steps = np.arange(64) * 4 + 2
    cells = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    distance = np.sqrt(((cells - np.array(list(CITYSCAPES_COLOURS))) ** 2).sum(axis=2))
    nearest, second = np.partition(distance, 1, axis=1)[:, :2].T
    ids = np.array(list(CITYSCAPES_COLOURS.values()), np.uint8)[distance.argmin(axis=1)]
    return np.where((nearest <= near) & (second - nearest >= CLEAR), ids, 0).astype(np.uint8)


def nearest_colours(rgb: np.ndarray, near: int = NEAR) -> np.ndarray:
    """Label ids (H, W) of gtFine's colours after JPEG compression (H, W, 3) uint8; 0 (void) where not clear."""
    red, green, blue = (rgb >> 2).astype(np.uint32).transpose(2, 0, 1)
    return _nearest_table(near).take(red << 12 | green << 6 | blue)


def segnet_split(stem: str) -> str:
    """The split of a CamVid frame in SegNet's data: test is all of Seq05VD and half of 0001TP, val a part of 0016E5."""
    match = re.fullmatch(CAMVID, stem)
    clip, number = (match[1], int(match[2])) if match else (stem, 0)
    if clip == "Seq05VD" or (clip == "0001TP" and number >= 8550):
        return "test"
    return "val" if clip == "0016E5" and 7959 <= number <= 8159 and number % 2 else "train"


LAYOUTS = (Cityscapes(), ImagePairs(), CamVid(), CamVidColours(), Kitti(), ColourFolders(), Arrays(), Folders())


def find_data_sets(root: Path, layouts: tuple[Layout, ...] | None = None) -> tuple[list[DataSet], Tree]:
    """The raw data sets at a folder or below it, and the tree that was looked through."""
    found, taken, tree = [], set(), Tree(root)
    for layout in layouts or LAYOUTS:
        for data_set in layout.find(tree):
            tops = {data_set.root, *(side.top for sides in data_set.splits.values() for side in sides)}
            if not tops & taken:
                taken |= tops
                found.append(data_set)
    return found, tree


def find_data(root: Path, coarse: bool = False, given_split: bool = False) -> DataSet:
    """The one raw data set at a folder or below it. Raises BadFile, showing what lies there, where there is not one."""
    if not root.is_dir():
        expected = " or ".join(layout.expected for layout in LAYOUTS[:3])
        raise BadFile(f"{root}: expected a folder with {expected}; found {'a file' if root.exists() else 'nothing'}")
    changed = {"cityscapes": Cityscapes(coarse), "camvid32": CamVidColours(given_split)}
    asked = tuple(changed.get(layout.name, layout) for layout in LAYOUTS)
    found, tree = find_data_sets(root, asked)
    if not found:
        raise BadFile(describe(tree))
    if len(found) > 1:
        places = "; ".join(f"{data_set.root} ({data_set.layout.name})" for data_set in found)
        raise BadFile(f"{root}: expected one data set, found {len(found)}; name one of them: {places}")
    return found[0]


def describe(tree: Tree) -> str:
    """What lies in a tree that no layout matches, and what the layout nearest to it expects."""
    holds = {path: next((n for n in names if ANY_PICTURE.search(n)), "") for path, (_, names) in tree.items()}
    shown = [path for path, name in holds.items() if name][:6]
    facts = {path: f"{len(tree[path][1])} files like {picture_facts(path / holds[path])}" for path in shown}
    there = [f"{path.relative_to(tree.root)}/ with {fact}" for path, fact in facts.items()]
    zipped = [path / name for path, (_, names) in tree.items() for name in names if ARCHIVE.search(name)]
    if zipped and not there:
        return f"{zipped[0]}: expected folders of pictures, found an archive ({len(zipped)} in all); unpack it"
    folders = {name.lower() for inner, _ in tree.values() for name in inner}
    words = [len(set(re.findall(r"\w+", layout.expected.lower())) & (folders - SPLITS.keys())) for layout in LAYOUTS]
    expected = f"{LAYOUTS[words.index(max(words))].expected} or another layout of docs/data.md"
    if len(half := {"leftimg8bit", "gtfine"} & folders) == 1:
        missing = "gtFine" if "leftimg8bit" in half else "leftImg8bit"
        expected = f"{missing}/ with folders of splits, because both archives of Cityscapes are needed"
    found = "; ".join(there) or ", ".join([*tree[tree.root][0], *tree[tree.root][1]][:8]) or "nothing"
    return f"{tree.root}: expected {expected}; found {found}" + (f"; {zipped[0]} is not unpacked" if zipped else "")


def picture_facts(path: Path) -> str:
    """Name, size and colours of a picture, for messages."""
    try:
        read = read_array if path.suffix.lower() == ".npy" else partial(read_pixels, indexed=True)
        pixels = read(path, read_bytes(path))
        number = len(np.unique(pixels.reshape(-1, *pixels.shape[2:]), axis=0))
        kind = "colours" if pixels.ndim == 3 else "values"
        return f"{path.name}, {pixels.shape[1]}x{pixels.shape[0]}, {number} {kind}"
    except (UserError, IndexError, ValueError, TypeError):
        return f"{path.name}, which is no readable picture"


def choose_splits(data_set: DataSet, asked: list[str] | None) -> list[str]:
    """The splits asked for, all of which must exist, or train, val and test where they exist and have labels."""
    usual = [split for split in ("train", "val", "test") if split not in data_set.layout.unlabelled]
    chosen = asked or [split for split in usual if split in data_set.splits]
    missing = [split for split in chosen if split not in data_set.splits]
    if missing or not chosen:
        found = sorted(data_set.splits) or "none"
        raise BadFile(f"{data_set.root}: expected the splits {missing or usual}, found {found}")
    return list(dict.fromkeys(chosen))
