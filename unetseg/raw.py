"""Raw data sets on disk: which layout a folder has, its splits, and which image belongs to which label file."""

from dataclasses import dataclass
from pathlib import Path

from .pictures import BadFile

DEFAULT_CLASSES = {"cityscapes": "cityscapes7", "camvid": "camvid7"}
DEFAULT_SPLITS = {"cityscapes": ("train", "val"), "camvid": ("train", "val", "test")}


@dataclass(frozen=True)
class Pair:
    """One image with its label file; `labels` is None where the split has no labels worth reading."""

    stem: str
    image: Path
    labels: Path | None


def find_layout(root: Path) -> str:
    """The layout, "cityscapes" or "camvid", by the folders under `root`. Raises BadFile for anything else."""
    expected = "leftImg8bit/ and gtFine/ (Cityscapes), or train/ and trainannot/ (CamVid, SegNet's split)"
    if not root.is_dir():
        raise BadFile(f"{root}: expected a folder with {expected}; found {'a file' if root.exists() else 'nothing'}")
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    if "leftImg8bit" in found and "gtFine" in found:
        return "cityscapes"
    if any(f"{name}annot" in found for name in found):
        return "camvid"
    inner = next((path.parent for path in root.glob("*/leftImg8bit")), None)
    hint = f"; did you mean {inner}?" if inner else ""
    raise BadFile(f"{root}: expected {expected}; found {', '.join(found[:8]) or 'no folders'}{hint}")


def list_pairs(root: Path, layout: str, split: str) -> tuple[list[Pair], dict[str, str]]:
    """The split's pairs, and by stem what is wrong with each image or label file that stands alone or double."""
    if layout == "cityscapes":
        images = _by_stem(root / "leftImg8bit" / split, "*/*", "_leftImg8bit.png")
        labels = _by_stem(root / "gtFine" / split, "*/*", "_gtFine_labelIds.png")
    else:
        images = _by_stem(root / split, "*", ".png")
        labels = _by_stem(root / f"{split}annot", "*", ".png")
    labelled = not (layout == "cityscapes" and split == "test")  # Cityscapes' test labels are dummies
    pairs, alone = [], {}
    for stem in sorted(images.keys() | (labels.keys() if labelled else set())):
        paths = [*images.get(stem, []), *(labels.get(stem, []) if labelled else [])]
        if stem and len(paths) == 1 + labelled and stem in images and (not labelled or stem in labels):
            pairs.append(Pair(stem, paths[0], paths[1] if labelled else None))
        else:
            alone[stem] = _why_unpaired(root, layout, split, stem, images, labels)
    return pairs, alone


def _by_stem(folder: Path, pattern: str, ending: str) -> dict[str, list[Path]]:
    """Stem -> files under `folder` whose names end so, in any case."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(pattern)):
        if path.name.lower().endswith(ending.lower()):
            found.setdefault(path.name[: -len(ending)], []).append(path)
    return found


def _why_unpaired(root: Path, layout: str, split: str, stem: str, images: dict, labels: dict) -> str:
    if not stem:
        return f"{next(iter(images.get(stem) or labels[stem]))}: expected a name before its ending, found none"
    doubles = next((paths for paths in (images.get(stem, []), labels.get(stem, [])) if len(paths) > 1), None)
    if doubles:
        return f"{doubles[0]}: expected one file of this name in the split, found also {doubles[1]}"
    if stem not in images:
        return f"{labels[stem][0]}: expected an image of the same name, found none"
    image = images[stem][0]
    if layout == "camvid":
        return f"{image}: expected its label file {root / f'{split}annot' / image.name}, found none"
    expected = root / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"
    found = "labelTrainIds: labelIds are needed" if list(expected.parent.glob(f"{stem}*TrainIds.png")) else "none"
    return f"{image}: expected its label file {expected}, found {found}"


def choose_splits(root: Path, layout: str, asked: list[str] | None) -> list[str]:
    """The splits asked for, all of which must exist, or the layout's defaults that do."""
    if layout == "cityscapes":
        found = {path.name for part in ("leftImg8bit", "gtFine") for path in (root / part).iterdir() if path.is_dir()}
    else:
        found = {path.name.removesuffix("annot") for path in root.iterdir() if path.is_dir()}
    missing = [split for split in asked or [] if split not in found]
    chosen = asked or [split for split in DEFAULT_SPLITS[layout] if split in found]
    if missing or not chosen:
        raise BadFile(
            f"{root}: expected the splits {missing or DEFAULT_SPLITS[layout]}, found {sorted(found) or 'none'}"
        )
    return list(dict.fromkeys(chosen))
