"""Class sets: names, colours, and which ids or colours of a label file become which class.

Each is a TOML file in class_sets/, or a user's own, which may give `people` and, for masks in colours, no ids:

    people = ["walker"]                        # classes that occluders are aimed at by default
    [classes]
    ground = { colour = [128, 64, 128] }       # in every picture, and in the masks
    walker = { colour = [220, 20, 60], colours = [[255, 0, 0], [200, 0, 0]] }  # in the masks, too
    [void]
    colours = [[0, 0, 0]]
"""

import hashlib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

IGNORE_INDEX = 255  # void: in no loss and no score under the void rule "ignore"
PEOPLE = ("person", "rider", "pedestrian", "bicyclist")  # of a class file that does not say who its people are


@dataclass(frozen=True, eq=False)
class ClassSet:
    """One way to sort the values of label files into classes 0..C-1 and void.

    names    C class names; those of `people` are what occluders are aimed at
    colours  (C, 3) uint8 RGB
    lookup   (256,) uint8, source id -> class id, or IGNORE_INDEX for void; known (256,) bool, the ids that exist
    palette  colours of the label files with their source id, where these are colours
    """

    name: str
    names: tuple[str, ...]
    colours: np.ndarray
    people: tuple[str, ...]
    lookup: np.ndarray = field(default_factory=lambda: np.full(256, IGNORE_INDEX, np.uint8))
    known: np.ndarray = field(default_factory=lambda: np.zeros(256, bool))
    palette: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def void_rules(self) -> tuple[str, ...]:
        """The void rules that make sense here: "background" needs a background class to put void into."""
        return ("ignore", "background") if self.names[0] == "background" else ("ignore",)

    def facts(self) -> dict:
        """What statistics, runs and results keep of it, for `stored`."""
        colours, people = self.colours.tolist(), list(self.people)
        return {"class_set": self.name, "classes": list(self.names), "colours": colours, "people": people}

    def digest(self) -> str:
        """A hash of everything that decides which mask a label file becomes."""
        tables = self.lookup.tolist(), self.known.tolist(), sorted(self.palette.items())
        return hashlib.sha256(repr((self.names, self.people, *tables)).encode()).hexdigest()[:16]

    def paint(self, mask: np.ndarray) -> np.ndarray:
        """Class ids (H, W), 255 = void -> RGB (H, W, 3) uint8; void is black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colours
        return palette.take(mask, axis=0)  # faster than palette[mask]


def stored(facts: dict) -> ClassSet:
    """The class set that statistics, a run or results name; its label files are no longer needed."""
    if "colours" not in facts and facts["class_set"] in CLASS_SETS:
        return CLASS_SETS[facts["class_set"]]
    names = tuple(facts["classes"])
    people = facts.get("people", [name for name in PEOPLE if name in names])
    return ClassSet(facts["class_set"], names, np.array(facts["colours"], np.uint8), tuple(people))


def class_set(name: str, classes: dict, void: dict | None = None, people: list[str] | None = None) -> ClassSet:
    """The class set that a class file describes; tools/class_files.py checks those of users."""
    people = [name for name in PEOPLE if name in classes] if people is None else people
    colours = np.array([entry["colour"] for entry in classes.values()], np.uint8)
    made = ClassSet(name, tuple(classes), colours, tuple(people))
    by_id = any("ids" in entry for entry in classes.values())
    for target, entry in [*enumerate(classes.values()), (IGNORE_INDEX, void or {})]:
        ids = entry.get("ids", []) if by_id else [target]
        made.known[ids], made.lookup[ids] = True, target
        shown = [entry["colour"]] if "colour" in entry else []
        made.palette.update({tuple(colour): target for colour in [*shown, *entry.get("colours", [])] if not by_id})
    return made


TABLES = sorted((Path(__file__).parent / "class_sets").glob("*.toml"))
CLASS_SETS = {path.stem: class_set(path.stem, **tomllib.loads(path.read_text())) for path in TABLES}
