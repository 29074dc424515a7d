"""Raw data sets on disk: how each layout is recognised, its splits, its pairs, and how its files are read.

To add a data set, write its class table into classes.py and its Layout into LAYOUTS below.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..images import BadFile, read_png


@dataclass(frozen=True)
class Pair:
    """One image with its label file; `labels` is None where the split has no labels worth reading."""

    stem: str
    image: Path
    labels: Path | None


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its files; {split} stands for the name of a split.

    class_sets      names in CLASS_SETS that its ids can become, the default first
    images, labels  glob pattern below the root, and the ending that follows a file's stem
    splits          those to process by default, if they exist; of the unlabelled ones, images alone
    expected        the layout in words, for error messages
    quick_size      width x height of a quick run: the shape of the originals, few pixels
    val_is_halved   whether val is cut into val and test
    """

    name: str
    class_sets: tuple[str, ...]
    images: tuple[str, str]
    labels: tuple[str, str]
    splits: tuple[str, ...]
    expected: str
    quick_size: str
    unlabelled: tuple[str, ...] = ()
    val_is_halved: bool = False

    def found_splits(self, root: Path) -> list[str]:
        """The splits that have a folder of images or of labels."""
        before, after = zip(*(pattern.split("/*")[0].split("{split}") for pattern, _ in (self.images, self.labels)))
        folders = (path for start in set(before) for path in root.glob(f"{start}*") if path.is_dir())
        return sorted({path.name.removesuffix(after[1]) for path in folders})

    def matches(self, root: Path) -> bool:
        """Whether a folder has this layout: folders of images and of labels, for at least one split each."""
        tops = {pattern.split("{split}")[0].rstrip("/") for pattern, _ in (self.images, self.labels)}
        if tops != {""}:
            return all((root / top).is_dir() for top in tops)
        ending = self.labels[0].split("/*")[0].replace("{split}", "")
        return any(path.name.endswith(ending) and path.is_dir() for path in root.iterdir())

    def pairs(self, root: Path, split: str) -> tuple[list[Pair], dict[str, str]]:
        """The split's pairs, and by stem what is wrong with each file that has no partner or several."""
        labelled = split not in self.unlabelled
        images = _by_stem(root, split, *self.images)
        labels = _by_stem(root, split, *self.labels) if labelled else {}
        pairs, problems = [], {}
        for stem in sorted(images.keys() | labels.keys()):
            image, label = images.get(stem, []), labels.get(stem, [])
            if stem and len(image) == 1 and len(label) == labelled:
                pairs.append(Pair(stem, image[0], label[0] if labelled else None))
            else:
                problems[stem] = self._why_unpaired(stem, image, label)
        return pairs, problems

    def _why_unpaired(self, stem: str, image: list[Path], label: list[Path]) -> str:
        """What is wrong with files that do not make a pair."""
        if not stem:
            return f"{(image + label)[0]}: expected a name before its ending, found none"
        for paths in (image, label):
            if len(paths) > 1:
                return f"{paths[0]}: expected one file of this name in the split, found also {paths[1]}"
        if not image:
            return f"{label[0]}: expected an image of the same name, found none"
        return f"{image[0]}: expected its label file {stem}{self.labels[1]}, found none"

    def read_image(self, path: Path, content: bytes) -> np.ndarray:
        """(H, W, 3) uint8 RGB. Raises BadFile."""
        return read_png(path, "RGB", content)

    def read_labels(self, path: Path, content: bytes) -> np.ndarray:
        """(H, W) uint8 source ids. Raises BadFile."""
        return read_png(path, "L", content)


def _by_stem(root: Path, split: str, pattern: str, ending: str) -> dict[str, list[Path]]:
    """Stem -> files whose names end so, in any case."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.glob(pattern.replace("{split}", split))):
        if path.name.lower().endswith(ending.lower()):
            found.setdefault(path.name[: -len(ending)], []).append(path)
    return found


LAYOUTS = (
    Layout(
        "cityscapes",
        ("cityscapes7", "cityscapes19"),
        ("leftImg8bit/{split}/*/*", "_leftImg8bit.png"),
        ("gtFine/{split}/*/*", "_gtFine_labelIds.png"),
        ("train", "val"),
        "leftImg8bit/ and gtFine/ (Cityscapes)",
        "192x96",
        unlabelled=("test",),  # the published labels of test are dummies
        val_is_halved=True,
    ),
    Layout(
        "camvid",
        ("camvid7", "camvid11"),
        ("{split}/*", ".png"),
        ("{split}annot/*", ".png"),
        ("train", "val", "test"),
        "train/ and trainannot/ (CamVid, SegNet's split)",
        "144x108",
    ),
)


def find_layout(root: Path) -> Layout:
    """The layout of a raw data set. Raises BadFile, showing what lies there, when none matches."""
    expected = " or ".join(layout.expected for layout in LAYOUTS)
    if not root.is_dir():
        raise BadFile(f"{root}: expected a folder with {expected}; found {'a file' if root.exists() else 'nothing'}")
    if found := next((layout for layout in LAYOUTS if layout.matches(root)), None):
        return found
    names = sorted(path.name for path in root.iterdir())
    inner = next((path for path in sorted(root.glob("*/")) if any(layout.matches(path) for layout in LAYOUTS)), None)
    hint = f"; did you mean {inner}?" if inner else ""
    raise BadFile(f"{root}: expected {expected}; found {', '.join(names[:8]) or 'nothing'}{hint}")


def choose_splits(root: Path, layout: Layout, asked: list[str] | None) -> list[str]:
    """The splits asked for, all of which must exist, or the layout's default ones that do."""
    found = layout.found_splits(root)
    missing = [split for split in asked or [] if split not in found]
    chosen = asked or [split for split in layout.splits if split in found]
    if missing or not chosen:
        raise BadFile(f"{root}: expected the splits {missing or layout.splits}, found {found or 'none'}")
    return list(dict.fromkeys(chosen))
