import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from unetseg.metrics import confusion_matrices, scores

AB = ("a", "b")


def confusion_matrix(pred, mask, num_classes):
    return confusion_matrices(pred[None], mask[None], num_classes)[0]


def ious(pred, mask, names=AB, void="ignore"):
    confusion = confusion_matrix(torch.tensor(pred), torch.tensor(mask), len(names)).numpy()
    return [values["iou"] for values in scores(confusion, names, void)["classes"].values()]


@pytest.mark.parametrize("pred, mask, expected", [
    ([0, 0, 1, 1], [0, 0, 1, 1],   [1, 1]),          # perfect
    ([0, 0, 0, 1], [0, 0, 1, 1],   [2 / 3, 1 / 2]),  # one pixel of b called a
    ([0, 0, 1, 1], [0, 0, 1, 255], [1, 1]),          # void does not count
    ([1, 1, 1, 1], [0, 0, 0, 255], [0, None]),       # b is absent: predicted in vain, and left out
])  # fmt: skip
def test_iou_by_hand(pred, mask, expected):
    assert ious(pred, mask) == pytest.approx(expected)


def test_void_as_background_counts_as_class_0():
    pred, mask = [0, 1, 1, 1], [0, 255, 255, 1]
    assert ious(pred, mask, void="background") == pytest.approx([1 / 3, 1 / 3])
    assert ious(pred, mask, void="ignore") == pytest.approx([1, 1])


def test_absent_class_is_left_out_and_said():
    confusion = confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 1]), 3).numpy()
    score = scores(confusion, ("a", "b", "c"), "ignore")
    assert score["absent"] == ["c"] and score["miou"] == 1 and score["classes"]["c"]["iou"] is None


def test_all_void_has_no_miou():
    score = scores(confusion_matrix(torch.tensor([0]), torch.tensor([255]), 2).numpy(), AB, "ignore")
    assert score["miou"] is None and score["accuracy"] == 0


def test_agrees_with_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    pred, mask = (torch.randint(0, 6, (4, 16, 16), generator=generator) for _ in range(2))
    mask[0, :4] = 255
    confusion = confusion_matrix(pred, mask, 6)
    assert (confusion[:-1] == MulticlassConfusionMatrix(6, ignore_index=255)(pred, mask)).all()
    reference = MulticlassJaccardIndex(6, average="none", ignore_index=255)(pred, mask)
    score = scores(confusion.numpy(), tuple("abcdef"), "ignore")
    assert [v["iou"] for v in score["classes"].values()] == pytest.approx(reference.tolist(), rel=1e-6)
    assert score["miou"] == pytest.approx(reference.mean().item(), rel=1e-6)


def test_precision_recall_f1():
    confusion = np.array([[6, 2], [1, 3], [9, 9]])  # the last row is void
    a = scores(confusion, AB, "ignore")["classes"]["a"]
    assert (a["precision"], a["recall"]) == pytest.approx((6 / 7, 6 / 8))
    assert a["f1"] == pytest.approx(2 * (6 / 7) * (6 / 8) / (6 / 7 + 6 / 8))
    assert scores(confusion, AB, "ignore")["accuracy"] == 9 / 12
