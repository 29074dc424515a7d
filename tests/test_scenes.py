import numpy as np
import pytest

from unetseg.classes import CLASS_SETS
from unetseg.files import UserError
from unetseg.tools.scenes import draw_dataset, draw_scene

# Full-resolution pixels of the 2975 training images of Cityscapes, void counted as background.
CITYSCAPES = np.array([1306362141, 2036416525, 1260636120, 459059194, 74789586, 879783988, 221979646])


def test_same_seed_same_bytes_another_seed_another_street():
    first, again, other = (draw_scene((256, 128), (seed, 0, 1)) for seed in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(first, again))
    assert (first[0] != other[0]).mean() > 0.5


def test_class_shares_are_within_a_factor_of_two_of_cityscapes():
    """Of people more: they are drawn near on purpose, so that a short training meets some."""
    class_set = CLASS_SETS["cityscapes7"]
    counts = np.zeros(256)
    for place in range(40):
        image, labels = draw_scene((512, 256), (0, 0, place))
        assert image.shape == (256, 512, 3) and class_set.known[np.unique(labels)].all()
        counts += np.bincount(labels.ravel(), minlength=256)
    drawn = np.bincount(class_set.lookup, weights=counts, minlength=256)
    drawn[0] += drawn[255]
    ratio = drawn[:7] / drawn[:7].sum() / (CITYSCAPES / CITYSCAPES.sum())
    most = np.where(np.array(class_set.names) == "person", 5, 2)
    assert (ratio > 0.5).all() and (ratio < most).all(), dict(zip(class_set.names, ratio.round(2)))
    assert counts[1] > 0 and counts[2] > 0, "ego vehicle and rectification border are drawn"


def test_a_second_call_draws_nothing_anew(tmp_path):
    assert draw_dataset(tmp_path, {"train": 1, "val": 1}, (128, 64)) == 2
    assert draw_dataset(tmp_path, {"train": 2, "val": 1}, (128, 64)) == 1
    for size, seed in (((256, 128), 0), ((128, 64), 1)):
        with pytest.raises(UserError, match=r"found drawn_000000_000000_gtFine_labelIds.png of 128x64; use another"):
            draw_dataset(tmp_path, {"train": 1, "val": 1}, size, seed)
