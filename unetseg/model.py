"""The U-Net, with any width and depth and for any input size, and the table of networks."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .settings import named_by


class UNet(nn.Module):
    """A U-Net that returns logits at the input's own size.

    channels  width of the first level; each level down doubles it
    depth     number of downsamplings; 64/3 is the published network with 7.7 M parameters, 64/4 the one with 31 M
    After Ronneberger et al., "U-Net", MICCAI 2015, with padded convolutions and batch normalisation (Ioffe & Szegedy,
    2015), weights drawn as in He et al., ICCV 2015.
    """

    def __init__(self, num_classes: int, channels: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(depth + 1)]
        self.stride = 2**depth
        self.down = nn.ModuleList(map(_double_conv, [3, *widths[:-1]], widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in reversed(widths[:-1]))
        self.merge = nn.ModuleList(_double_conv(2 * width, width) for width in reversed(widths[:-1]))
        self.head = nn.Conv2d(channels, num_classes, 1)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) float in [0, 1] -> logits (N, C, H, W); any H and W."""
        height, width = image.shape[-2:]
        return self.head(self.features(image)[-1])[..., :height, :width]

    def features(self, image: Tensor) -> list[Tensor]:
        """The decoder's features, from the coarsest level up to the size of the padded image."""
        height, width = image.shape[-2:]
        x = F.pad(image, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        skips, features = [], []
        for block in self.down[:-1]:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.down[-1](x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
            features.append(x)
        return features


class ContextUNet(UNet):
    """A U-Net with two extra dilated convolutions at its bottleneck, for a larger receptive field, and auxiliary heads,
    in training only, on the two levels below the finest.

    Dilation after Yu & Koltun, ICLR 2016; the heads after Lee et al., "Deeply-Supervised Nets", AISTATS 2015.
    """

    def __init__(self, num_classes: int, channels: int = 32, depth: int = 4) -> None:
        super().__init__(num_classes, channels, depth)
        self.down[-1].append(_Dilated(channels * 2**depth, 2)).append(_Dilated(channels * 2**depth, 4))
        widths = [channels * 2**level for level in range(1, min(3, depth))]
        self.side_heads = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in widths)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits (N, C, H, W); while training a list that starts with them and goes on with coarser ones."""
        height, width = image.shape[-2:]
        *coarse, fine = self.features(image)
        logits = self.head(fine)[..., :height, :width]
        if not self.training:
            return logits
        return [logits, *(head(x) for head, x in zip(self.side_heads, reversed(coarse)))]


class _Dilated(nn.Sequential):
    """A residual convolution with holes, in groups of 16 channels."""

    def __init__(self, width: int, dilation: int) -> None:
        holes = {"padding": dilation, "dilation": dilation, "groups": math.gcd(width, max(1, width // 16))}
        convolution = nn.Conv2d(width, width, 3, bias=False, **holes)
        super().__init__(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (in_channels, out_channels):
        convolution = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# name -> function (num_classes, any settings by their names) -> network that returns logits
MODELS = {"unet": UNet, "context_unet": ContextUNet}


def build_model(settings: dict, num_classes: int) -> nn.Module:
    """The network that a run's settings name, with random weights."""
    make = MODELS[settings["model"]]
    return make(num_classes, **named_by(make, settings))
