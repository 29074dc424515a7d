import pytest
import torch

from unetseg.model import UNet


@pytest.mark.parametrize("height, width", [(64, 64), (50, 75), (17, 33), (1, 1)])
def test_logits_have_the_inputs_size(height, width):
    assert UNet(7, channels=4, depth=3)(torch.rand(2, 3, height, width)).shape == (2, 7, height, width)


@pytest.mark.parametrize("channels, depth, millions", [(64, 3, 7.7), (64, 4, 31.0), (16, 4, 1.9), (32, 4, 7.8)])
def test_known_sizes(channels, depth, millions):
    num_weights = sum(weight.numel() for weight in UNet(7, channels, depth).parameters())
    assert num_weights / 1e6 == pytest.approx(millions, abs=0.07)


def test_every_weight_gets_a_gradient():
    model = UNet(7, channels=4, depth=2)
    model(torch.rand(2, 3, 16, 16)).square().mean().backward()
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
