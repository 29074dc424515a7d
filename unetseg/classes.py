"""The class sets as tables: source id, name, official colour, and the class that each id becomes."""

from dataclasses import dataclass

import numpy as np

IGNORE_INDEX = 255  # void: in no loss and no score under the void rule "ignore"
VOID_RULES = ("ignore", "background")
PEOPLE = ("person", "rider", "pedestrian", "bicyclist")  # classes that occluders are aimed at by default

# Cityscapes' 34 label ids, names, trainIds and colours (cityscapesscripts, helpers/labels.py).
_CITYSCAPES = """
#  id  name                  trainId  colour         cityscapes7
    0  unlabeled             255        0   0   0    void
    1  ego_vehicle           255        0   0   0    void
    2  rectification_border  255        0   0   0    void
    3  out_of_roi            255        0   0   0    void
    4  static                255        0   0   0    void
    5  dynamic               255      111  74   0    void
    6  ground                255       81   0  81    void
    7  road                    0      128  64 128    road
    8  sidewalk                1      244  35 232    background
    9  parking               255      250 170 160    background
   10  rail_track            255      230 150 140    background
   11  building                2       70  70  70    building
   12  wall                    3      102 102 156    background
   13  fence                   4      190 153 153    background
   14  guard_rail            255      180 165 180    background
   15  bridge                255      150 100 100    background
   16  tunnel                255      150 120  90    background
   17  pole                    5      153 153 153    background
   18  polegroup             255      153 153 153    background
   19  traffic_light           6      250 170  30    background
   20  traffic_sign            7      220 220   0    background
   21  vegetation              8      107 142  35    vegetation
   22  terrain                 9      152 251 152    background
   23  sky                    10       70 130 180    sky
   24  person                 11      220  20  60    person
   25  rider                  12      255   0   0    person
   26  car                    13        0   0 142    vehicle
   27  truck                  14        0   0  70    vehicle
   28  bus                    15        0  60 100    vehicle
   29  caravan               255        0   0  90    vehicle
   30  trailer               255        0   0 110    vehicle
   31  train                  16        0  80 100    vehicle
   32  motorcycle             17        0   0 230    vehicle
   33  bicycle                18      119  11  32    vehicle
"""

# CamVid in SegNet's 11 classes, with CamVid's own colours (Brostow et al., 2009).
_CAMVID = """
#  id  name                  trainId  colour         camvid7
    0  sky                     0      128 128 128    sky
    1  building                1      128   0   0    building
    2  pole                    2      192 192 128    background
    3  road                    3      128  64 128    road
    4  pavement                4        0   0 192    background
    5  tree                    5      128 128   0    vegetation
    6  sign_symbol             6      192 128 128    background
    7  fence                   7       64  64 128    background
    8  car                     8       64   0 128    vehicle
    9  pedestrian              9       64  64   0    person
   10  bicyclist              10        0 128 192    person
   11  unlabelled            255        0   0   0    void
"""

# Each of the seven classes has the Cityscapes colour of its main member; background has that of fence.
_SEVEN = {
    "background": (190, 153, 153),
    "road": (128, 64, 128),
    "building": (70, 70, 70),
    "vehicle": (0, 0, 142),
    "person": (220, 20, 60),
    "vegetation": (107, 142, 35),
    "sky": (70, 130, 180),
}


@dataclass(frozen=True, eq=False)
class ClassSet:
    """One way to sort the source ids of a data set into classes 0..C-1 and void.

    names    C class names
    colours  (C, 3) uint8 RGB
    known    (256,) bool: the source ids that exist
    lookup   (256,) uint8: source id -> class id, IGNORE_INDEX for void (and for ids that do not exist)
    """

    name: str
    names: tuple[str, ...]
    colours: np.ndarray
    known: np.ndarray
    lookup: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def void_rules(self) -> tuple[str, ...]:
        """The void rules that make sense here: "background" needs a background class to put void into."""
        return VOID_RULES if self.names[0] == "background" else VOID_RULES[:1]

    def paint(self, mask: np.ndarray) -> np.ndarray:
        """Class ids (H, W), 255 = void -> RGB (H, W, 3) uint8; void is black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colours
        return palette.take(mask, axis=0)  # faster than palette[mask]


def _class_set(name: str, table: str, seven: bool) -> ClassSet:
    """The class set that a table above describes, by its trainIds or by its last column."""
    rows = [line.split() for line in table.strip().splitlines()[1:]]
    by_train_id = {int(train): (label, (int(r), int(g), int(b))) for _, label, train, r, g, b, _ in rows}
    colours = _SEVEN if seven else dict(by_train_id[c] for c in sorted(by_train_id) if c != IGNORE_INDEX)
    known, lookup = np.zeros(256, bool), np.full(256, IGNORE_INDEX, np.uint8)
    for id_, label, _, *_, in_seven in rows:
        member = in_seven if seven else label
        known[int(id_)] = True
        lookup[int(id_)] = list(colours).index(member) if member in colours else IGNORE_INDEX
    return ClassSet(name, tuple(colours), np.array(list(colours.values()), np.uint8), known, lookup)


CLASS_SETS = {
    "cityscapes7": _class_set("cityscapes7", _CITYSCAPES, seven=True),
    "cityscapes19": _class_set("cityscapes19", _CITYSCAPES, seven=False),
    "camvid11": _class_set("camvid11", _CAMVID, seven=False),
    "camvid7": _class_set("camvid7", _CAMVID, seven=True),
}
