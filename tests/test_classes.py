import numpy as np
import pytest
from cityscapesscripts.helpers.labels import labels as official

from unetseg.classes import CLASS_SETS, IGNORE_INDEX

BACKGROUND = [8, 9, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22]
SEVEN = {"background": BACKGROUND, "road": [7], "building": [11], "vehicle": [26, 27, 28, 29, 30, 31, 32, 33]}
SEVEN |= {"person": [24, 25], "vegetation": [21], "sky": [23]}


def test_cityscapes19_is_the_official_table():
    class_set = CLASS_SETS["cityscapes19"]
    labels = [label for label in official if label.id >= 0]
    for label in labels:
        train_id = label.trainId if 0 <= label.trainId < 19 else IGNORE_INDEX
        assert class_set.known[label.id] and class_set.lookup[label.id] == train_id
        if train_id != IGNORE_INDEX:
            assert tuple(class_set.colours[train_id]) == label.color
            assert class_set.names[train_id] == label.name.replace(" ", "_")
    assert len(labels) == 34 == class_set.known.sum()


def test_cityscapes7_groups_every_id_once():
    class_set = CLASS_SETS["cityscapes7"]
    assert class_set.names == tuple(SEVEN)
    for class_id, ids in enumerate(SEVEN.values()):
        assert np.flatnonzero(class_set.lookup[:34] == class_id).tolist() == ids
    assert np.flatnonzero(class_set.lookup[:34] == IGNORE_INDEX).tolist() == list(range(7))


CAMVID = {"camvid11": [*range(11), 255], "camvid7": [6, 2, 0, 1, 0, 5, 0, 0, 3, 4, 4, 255]}


@pytest.mark.parametrize("name, lookup", CAMVID.items())
def test_camvid_tables(name, lookup):
    class_set = CLASS_SETS[name]
    assert class_set.lookup[:12].tolist() == lookup and class_set.known.sum() == 12


def test_only_sets_with_a_background_have_the_background_rule():
    assert {name for name, s in CLASS_SETS.items() if "background" in s.void_rules} == {"cityscapes7", "camvid7"}


def test_paint_uses_the_colours_and_black_for_void():
    painted = CLASS_SETS["cityscapes7"].paint(np.array([[1, 255], [4, 6]], np.uint8))
    assert painted.tolist() == [[[128, 64, 128], [0, 0, 0]], [[220, 20, 60], [70, 130, 180]]]
