"""A user's class file: read and checked, or written anew from what lies among the masks."""

import colorsys
import re
import tomllib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..classes import IGNORE_INDEX, ClassSet, class_set
from ..files import UserError, read_bytes, write_bytes
from .layouts import Folders, Tree, read_mask

MOST_CLASSES = 64  # in a first file; more values than that are no classes


def read_class_file(path: Path) -> ClassSet:
    """The class set in a TOML file. Raises UserError, saying what was expected."""
    content = read_bytes(path)
    try:
        found = tomllib.loads(content.decode())
        if not {"classes"} <= found.keys() <= {"classes", "void", "people"}:
            raise ValueError(f"the entries {', '.join(found) or 'none'}; expected [classes], [void] and people")
        for expected, holds in rules(**found).items():
            if not holds:
                raise ValueError(f"something else; expected {expected}")
        return class_set(path.stem, **found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected a class file as in docs/data.md, found {error}") from None


def rules(classes: dict, void: dict | None = None, people: list | None = None) -> dict[str, bool]:
    """What a class file must be, in words, and whether it is."""
    entries, void = list(classes.values()), void or {}
    ids = [id_ for entry in (*entries, void) for id_ in entry.get("ids", [])]
    shown = [tuple(entry["colour"]) for entry in entries if "colour" in entry]
    colours = [*shown, *(tuple(colour) for entry in (*entries, void) for colour in entry.get("colours", []))]
    return {
        "two to 253 classes, none of them named void": 1 < len(classes) < 254 and "void" not in classes,
        "a colour for each class": len(shown) == len(entries),
        "no entries but colour, colours and ids": {"colour", "colours", "ids"} >= set().union(*entries, void),
        "colours of three whole numbers from 0 to 255": all(len(c) == 3 and all(map(is_byte, c)) for c in colours),
        "ids from 0 to 255": all(map(is_byte, ids)),
        "ids for all classes, or for none": len({"ids" in entry for entry in entries}) == 1,
        "each id once": len(set(ids)) == len(ids),
        "each colour once": bool(ids) or len(set(colours)) == len(colours),
        "people as a list of names of classes": isinstance(people or [], list) and set(people or []) <= classes.keys(),
    }


def is_byte(value: object) -> bool:
    return type(value) is int and 0 <= value <= 255


def write_class_file(folder: Path, out: Path | None = None) -> str:
    """Look at every mask below `folder` and write a first class file; returns what was found, as text."""
    found = list(Folders().find(Tree(folder)))
    if len(found) != 1:
        raise UserError(f"{folder}: expected one folder of images beside one of masks, found {len(found)}")
    path = out or found[0].root / "classes.toml"
    if path.exists():
        raise UserError(f"{path}: exists already; edit it, or write another one with --out")
    counts = count_values([p for sides in found[0].splits.values() for ps in sides[1].by_stem.values() for p in ps])
    total, names = sum(counts.values()), given_names(found[0].root)
    if not 1 < len(counts) <= MOST_CLASSES:
        raise UserError(f"{folder}: expected 2 to {MOST_CLASSES} classes in the masks, found {len(counts)} values")
    lines = ["# Written from the masks: name each class, and those of people in `people = [...]`.", "", "[classes]"]
    void = [value for value in counts if value == IGNORE_INDEX and len(counts) > 2]
    for place, value in enumerate(sorted(counts.keys() - set(void))):
        colour = list(value) if isinstance(value, tuple) else shade(place)
        ids = "" if isinstance(value, tuple) else f", ids = [{value}]"
        name, share = names.get(value, "void"), counts[value] / total
        name = f"class_{place}" if name == "void" or list(names.values()).count(name) > 1 else name
        lines.append(f'"{name}" = {{ colour = {colour}{ids} }}  # {share:.1%} of the pixels')
    lines += ["", "[void]", f"ids = {void}"] if void else []
    write_bytes(path, ("\n".join(lines) + "\n").encode())
    return f"{path}: {len(counts)} values, written as classes to be named:\n" + "\n".join(lines[3:])


def count_values(paths: list[Path]) -> dict:
    """Pixels per id, or per colour (red, green, blue), of mask files."""
    counts: dict = {}
    for path in tqdm(paths, "masks", unit="img", leave=False, delay=1):
        mask = read_mask(path, read_bytes(path))
        flat = mask.reshape(-1, mask.shape[2]) if mask.ndim == 3 else mask.ravel()
        values, numbers = np.unique(flat, axis=0 if mask.ndim == 3 else None, return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist()):
            key = tuple(value) if mask.ndim == 3 else value
            counts[key] = counts.get(key, 0) + number
    if len({isinstance(value, tuple) for value in counts}) > 1:
        raise UserError(f"{paths[0].parent}: expected masks of ids or of colours, found both")
    return counts


def given_names(root: Path) -> dict:
    """Names of ids or colours in the lists that CamVid, CVAT (labelmap.txt) and Roboflow (_classes.csv) add."""
    names: dict = {}
    lists = ("class_dict.csv", "labelmap.txt", "*/_classes.csv")
    for path in [path for pattern in lists for path in root.glob(pattern)]:
        for line in path.read_text(errors="replace").splitlines():
            if match := re.match(r"\s*([^,:#]+)[,:]\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)", line):
                names[tuple(map(int, match.groups()[1:]))] = match[1]
            elif match := re.match(r"\s*(\d+)\s*,\s*([^,]+?)\s*$", line):
                names[int(match[1])] = match[2]
    return {value: name.replace('"', "").replace("\\", "") for value, name in names.items()}


def shade(place: int) -> list[int]:
    """A colour for the class at this place, unlike those before it."""
    return [round(255 * part) for part in colorsys.hsv_to_rgb(0.618 * place % 1, 0.75, 0.9 - 0.15 * (place % 3))]
