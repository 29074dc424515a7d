"""Augmentation of whole batches, on their device, decided by a table of uniform draws made on the CPU.

Row i of an epoch's table belongs to sample i, so what a sample looks like depends on (seed, epoch, i) alone: not on the
batch it travels in, the process or the device. Inputs are never modified. Images are (N, 3, H, W) float32 in [0, 1],
masks (N, H, W) int64 class ids, IGNORE_INDEX = void.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .classes import IGNORE_INDEX

BASIC = ("flip", "zoom", "shift_x", "shift_y", "brightness", "contrast", "saturation")
OCCLUSION = ("apply", "aim", "instance", "x", "y", "width", "height", "texture")
OCCLUSION += ("red", "green", "blue", "donor", "roll_x", "roll_y")
COLUMNS = BASIC + OCCLUSION
TEXTURES = ("flat", "metallic", "noise", "patch")


def epoch_draws(num_samples: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """The order of an epoch's samples (N,) int64 and its table of draws (N, len(COLUMNS)) in [0, 1)."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(num_samples, generator=generator), torch.rand(num_samples, len(COLUMNS), generator=generator)


def donors(rows: Tensor, num_samples: int) -> Tensor:
    """(N,) int64: which image of the data set each sample's patch is taken from."""
    return (_column(rows, "donor") * num_samples).long()


def _column(rows: Tensor, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * rows[:, COLUMNS.index(name)]


def basic(images: Tensor, masks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Flip, zoom between 0.6 and 1.4 at a random place, then change brightness, contrast and saturation.

    rows  (N, len(COLUMNS)) draws, on the images' device
    What a zoom below 1 brings in from outside the image is void.
    """
    mirror = 1 - 2 * (_column(rows, "flip") < 0.5).float()
    scale = 1 / _column(rows, "zoom", 0.6, 1.4)  # input pixels per output pixel
    room = (1 - scale).abs()
    theta = rows.new_zeros(len(rows), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = mirror * scale, scale
    theta[:, 0, 2] = _column(rows, "shift_x", -1, 1) * room
    theta[:, 1, 2] = _column(rows, "shift_y", -1, 1) * room
    images, masks = warp(images, masks, theta)
    return recolour(images, rows), masks


def warp(images: Tensor, masks: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Sample images (bilinear) and masks (nearest) on one affine grid; theta (N, 2, 3) as F.affine_grid takes it."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)  # (N, H, W, 2)
    shifted = (masks + 1) & IGNORE_INDEX  # of eight ones: void becomes 0, as is what lies outside, and 0 void again
    shifted = F.grid_sample(shifted[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return images, (shifted[:, 0].long() - 1) & IGNORE_INDEX


def recolour(images: Tensor, rows: Tensor) -> Tensor:
    """Scale brightness, contrast (about the image's mean) and saturation by up to 30 %, in that order.

    All three together are one 3x3 matrix and one offset per image.
    """
    brightness, contrast, saturation = (
        _column(rows, name, 0.7, 1.3) for name in ("brightness", "contrast", "saturation")
    )
    gain = brightness * contrast
    offset = (1 - contrast) * brightness * images.mean(dim=(1, 2, 3))
    grey = images.new_full((3, 3), 1 / 3)
    own = torch.eye(3, dtype=images.dtype, device=images.device)
    matrix = gain[:, None, None] * (
        saturation[:, None, None] * own + (1 - saturation)[:, None, None] * grey
    )  # (N, 3, 3)
    return torch.baddbmm(offset[:, None, None], matrix, images.flatten(2)).view_as(images).clamp_(0, 1)


def occlude(
    images: Tensor,
    masks: Tensor,
    rows: Tensor,
    boxes: Tensor,
    num_boxes: Tensor,
    donor_images: Tensor,
    probability: float = 0.5,
    aimed: float = 0.5,
    policy: str = "keep",
) -> tuple[Tensor, Tensor]:
    """Cover one rectangle of some images with a flat colour, brushed metal, noise, or a patch of another image.

    rows        (N, len(COLUMNS)) draws
    boxes       (N, K, 4) float x0, y0, x1, y1 in pixels: the instances of each image that may be aimed at
    num_boxes   (N,) how many of the K are real
    donor_images (N, 3, H, W) the images that patches are taken from
    probability share of images that are occluded
    aimed       share of the rectangles that are placed on an instance, where the image has one
    policy      "keep": covered pixels keep their class, the network must infer it; "void": they leave the loss
    After Zhong et al., "Random Erasing", AAAI 2020, and Fong & Vedaldi, "Occlusions for Effective Data Augmentation",
    ICCVW 2019; aiming at instances is ours.
    """
    height, width = images.shape[-2:]
    ys = torch.arange(height, device=images.device)[None, :, None]  # (1, H, 1)
    xs = torch.arange(width, device=images.device)[None, None, :]  # (1, 1, W)
    x0, y0, x1, y1 = (side[:, None, None] for side in _rectangles(rows, boxes, num_boxes, aimed, height, width))
    covered = (xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1)  # (N, H, W)
    covered &= (_column(rows, "apply") < probability)[:, None, None]
    images = torch.where(covered[:, None], _texture(rows, donor_images, ys, xs), images)
    return images, masks.masked_fill(covered, IGNORE_INDEX) if policy == "void" else masks.clone()


def _rectangles(rows: Tensor, boxes: Tensor, num_boxes: Tensor, aimed: float, height: int, width: int) -> Tensor:
    """(4, N) x0, y0, x1, y1: a tenth to four tenths of the image's sides, or 0.4 to 1 times an instance's."""
    picked = (_column(rows, "instance") * num_boxes).long()
    box = boxes[torch.arange(len(rows), device=rows.device), picked]  # (N, 4)
    on_instance = (_column(rows, "aim") < aimed) & (num_boxes > 0)
    corners = []
    for axis, (shift, extent, side) in enumerate((("x", "width", width), ("y", "height", height))):
        low = torch.where(on_instance, box[:, axis], 0.0)
        span = torch.where(on_instance, box[:, axis + 2] - box[:, axis], float(side))
        share = torch.where(on_instance, _column(rows, extent, 0.4, 1.0), _column(rows, extent, 0.1, 0.4))
        start = low + _column(rows, shift) * span * (1 - share)
        corners += [start, start + share * span]
    x0, x1, y0, y1 = corners
    return torch.stack([x0, y0, x1, y1])


def _texture(rows: Tensor, donor_images: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """(N, 3, H, W): each sample's occluder as a whole picture."""
    height, width = donor_images.shape[-2:]
    roll_x = (_column(rows, "roll_x") * width).long()[:, None, None]
    roll_y = (_column(rows, "roll_y") * height).long()[:, None, None]
    ys, xs = (ys + roll_y) % height, (xs + roll_x) % width  # (N, H, 1), (N, 1, W)
    colour = torch.stack([_column(rows, name) for name in ("red", "green", "blue")], dim=1)[:, :, None, None]
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)).to(donor_images)
    streaks = noise[0, :, :1].expand(height, width)
    sheen = torch.sin(2 * math.pi * (xs / width + 0.3 * ys / height))  # (N, H, W)
    metallic = (0.55 + 0.25 * sheen + 0.2 * (streaks[ys, xs] - 0.5))[:, None] * (0.85 + 0.3 * (colour - 0.5))
    batch = torch.arange(len(rows), device=rows.device)[:, None, None]
    patch = donor_images.movedim(1, -1)[batch, ys, xs].movedim(-1, 1)
    kind = (_column(rows, "texture") * len(TEXTURES)).long()
    flat, noisy = colour.expand_as(donor_images), noise[:, ys, xs].movedim(0, 1)
    choices = torch.stack([flat, metallic, noisy, patch])  # (4, N, 3, H, W)
    return choices[kind, batch[:, 0, 0]].clamp(0, 1)
