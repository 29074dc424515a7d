import pytest
import torch
from monai.losses import DiceLoss

from unetseg.losses import ce_dice, cross_entropy, deep_supervision, dice_loss

V = 255
HALF = torch.zeros(1, 2, 2, 2)  # both classes at 1/2, 2x2 pixels


def mask(*rows):
    return torch.tensor([rows])


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0])])
def test_cross_entropy_of_void_alone_is_zero(weights):
    assert cross_entropy(HALF, mask([V, V], [V, V]), weights).item() == 0


@pytest.mark.parametrize("truth, expected", [
    (mask([0, 0], [1, 1]), 0.5),   # each class: 2·(2·½) / (4·½ + 2) = 1/2
    (mask([0, 0], [0, 0]), 1 / 3), # class 0 alone: 2·2 / (2 + 4) = 2/3; class 1 is absent
    (mask([0, V], [V, V]), 1 / 3), # one valid pixel: 2·½ / (½ + 1) = 2/3
    (mask([V, V], [V, V]), 0.0),
])  # fmt: skip
def test_dice_by_hand(truth, expected):
    assert dice_loss(HALF, truth).item() == pytest.approx(expected)


def test_dice_agrees_with_monai():
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 5, 8, 8), torch.randint(0, 5, (3, 8, 8))
    reference = DiceLoss(to_onehot_y=True, softmax=True, batch=True, smooth_nr=0, smooth_dr=1e-6)
    assert dice_loss(logits, truth).item() == pytest.approx(reference(logits, truth[:, None]).item(), abs=1e-6)


def test_cross_entropy_agrees_with_torch():
    torch.manual_seed(0)
    logits, truth, weights = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8)), torch.rand(4) + 0.1
    truth[0, :3] = V
    for w in (None, weights):
        reference = torch.nn.functional.cross_entropy(logits, truth, w, ignore_index=V)
        assert cross_entropy(logits, truth, w).item() == pytest.approx(reference.item(), rel=1e-5)


@pytest.mark.parametrize("loss_fn", [cross_entropy, dice_loss, ce_dice])
def test_void_pixels_get_no_gradient(loss_fn):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    truth = torch.randint(0, 3, (1, 4, 4))
    truth[:, 1] = V
    loss_fn(logits, truth).backward()
    assert (logits.grad[:, :, 1] == 0).all() and (logits.grad[:, :, 0] != 0).any()


def test_ratio_is_what_it_says():
    torch.manual_seed(0)
    logits, truth = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    ce, dice = cross_entropy(logits, truth).item(), dice_loss(logits, truth).item()
    assert ce_dice(logits, truth, dice_share=0.7).item() == pytest.approx(0.3 * ce + 0.7 * dice)
    assert 0 <= dice <= 1


def test_deep_supervision_adds_three_tenths_of_each_coarser_loss():
    """Of 5x6 pixels, padded to 8x8, the coarse logits are compared with (1, 1), (1, 3), (1, 5), (3, 1) and so on."""
    torch.manual_seed(0)
    fine, coarse, truth = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 5, 6))
    main, side = cross_entropy(fine, truth), cross_entropy(coarse[..., :2, :3], truth[:, 1::2, 1::2])
    total, shown = deep_supervision(cross_entropy, [fine, coarse], truth)
    assert total.item() == pytest.approx((main + 0.3 * side).item()) and shown == main
    assert deep_supervision(cross_entropy, fine, truth) == (main, main)
