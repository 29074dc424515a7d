import pytest
import torch

from unetseg.losses import cross_entropy, deep_supervision
from unetseg.model import MODELS, ContextUNet, UNet


@pytest.mark.parametrize("make", MODELS.values())
@pytest.mark.parametrize("height, width", [(64, 64), (50, 75), (17, 33), (1, 1)])
def test_logits_have_the_inputs_size(make, height, width):
    assert make(7, channels=4, depth=3).eval()(torch.rand(2, 3, height, width)).shape == (2, 7, height, width)


@pytest.mark.parametrize("make, channels, depth, millions", [
    (UNet, 64, 3, 7.7), (UNet, 64, 4, 31.0), (UNet, 16, 4, 1.9), (UNet, 32, 4, 7.8),
    (ContextUNet, 16, 4, 2.0), (ContextUNet, 32, 4, 7.9),
])  # fmt: skip
def test_known_sizes(make, channels, depth, millions):
    num_weights = sum(weight.numel() for weight in make(7, channels, depth).parameters())
    assert num_weights / 1e6 == pytest.approx(millions, abs=0.07)


SHAPES = {1: [(50, 75)], 2: [(50, 75), (26, 38)], 3: [(50, 75), (28, 40), (14, 20)]}  # by depth


@pytest.mark.parametrize("depth, shapes", SHAPES.items())
def test_side_heads_answer_at_a_quarter_and_at_half_the_size_while_training(depth, shapes):
    model = ContextUNet(7, channels=4, depth=depth)
    assert [tuple(out.shape[2:]) for out in model(torch.rand(2, 3, 50, 75))] == shapes
    assert model.eval()(torch.rand(2, 3, 50, 75)).shape == (2, 7, 50, 75)


@pytest.mark.parametrize("depth, width, height", [(4, 50, 50), (4, 68, 36), (4, 97, 41), (5, 80, 60)])
def test_side_heads_learn_at_any_size(depth, width, height):
    outputs, mask = ContextUNet(7, 4, depth)(torch.rand(2, 3, height, width)), torch.ones(2, height, width).long()
    assert deep_supervision(cross_entropy, outputs, mask)[0].isfinite()


@pytest.mark.parametrize("make", MODELS.values())
def test_every_weight_gets_a_gradient(make):
    model = make(7, channels=4, depth=2)
    outputs = model(torch.rand(2, 3, 32, 32))
    sum(output.square().mean() for output in (outputs if isinstance(outputs, list) else [outputs])).backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in model.named_parameters() if "bias" not in name)


def test_he_initialisation():
    weight = UNet(7, channels=32, depth=2).down[1][3].weight  # 64 -> 64, 3x3
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_padding_changes_nothing_inside():
    """A picture whose size fits needs no padding, and a larger one agrees with it far from the border."""
    torch.manual_seed(0)
    model, image = UNet(3, channels=4, depth=2).eval(), torch.rand(1, 3, 64, 61)
    with torch.inference_mode():
        assert torch.allclose(model(image)[..., :16], model(image[..., :60])[..., :16], atol=1e-5)
