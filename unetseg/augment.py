"""Augmentation of whole batches on their device, decided by tables of uniform random numbers drawn on the CPU.

An augmentation takes images (N, 3, H, W) float32 in [0, 1], masks (N, H, W) int64 class ids with IGNORE_INDEX = void,
draws {name: (N,) in [0, 1)}, the Source of the samples, and any settings by their names. It returns new images and
masks and leaves the inputs alone. Each has a random stream of its own, in which row i belongs to sample i: what a
sample looks like depends on (seed, epoch, i) alone, not on its batch, process or device, nor on other augmentations.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .classes import IGNORE_INDEX

AUGMENTATIONS: dict[str, Callable] = {}  # filled by @augmentation
TEXTURES = ("flat", "metallic", "noise", "patch")
GRAINS = 6  # squares of noise are 1, 2, 4, ... 32 pixels wide


class Source(NamedTuple):
    """Of a batch: instances that may be aimed at, boxes (N, K, 4) float x0, y0, x1, y1 in pixels, num_boxes (N,) of
    them real, and donor_images, a function of (N,) numbers in [0, 1) -> other images (N, 3, H, W) of the data set."""

    boxes: Tensor
    num_boxes: Tensor
    donor_images: Callable[[Tensor], Tensor]


def augmentation(draws: str) -> Callable:
    """Enter a function in AUGMENTATIONS; `draws` names the random numbers that it needs for each sample."""

    def enter(function: Callable) -> Callable:
        function.draws = draws.split()
        AUGMENTATIONS[function.__name__] = function
        return function

    return enter


def stream(name: str, seed: int, epoch: int) -> torch.Generator:
    """The random generator that belongs to (name, seed, epoch)."""
    digest = hashlib.sha256(f"{name} {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def epoch_draws(name: str, num_samples: int, seed: int, epoch: int) -> Tensor:
    """(num_samples, D) numbers in [0, 1): a row per sample, a column per random number of the augmentation."""
    return torch.rand(num_samples, len(AUGMENTATIONS[name].draws), generator=stream(name, seed, epoch))


def between(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw


@augmentation("flip zoom shift_x shift_y centre instance brightness contrast saturation")
def basic(
    images: Tensor, masks: Tensor, draws: dict, source: Source | None = None, centred: float = 0.0, colour: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Flip, zoom between 0.6 and 1.4 at a random place, then change brightness, contrast, saturation by up to `colour`.

    centred  share in [0, 1] of the images in whose middle, or near it, an instance shall lie
    What a zoom below 1 brings in from outside the image is its reflection.
    """
    mirror = 1 - 2 * (draws["flip"] < 0.5).float()
    scale = 1 / between(draws["zoom"], 0.6, 1.4)  # input pixels per output pixel
    room = (1 - scale).abs()
    theta = scale.new_zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = mirror * scale, scale
    for axis, name in enumerate(("shift_x", "shift_y")):
        theta[:, axis, 2] = between(draws[name], -1, 1) * room
        if source is not None and centred:
            middle = _instance(draws, source)[:, axis::2].sum(dim=1) / images.shape[3 - axis] - 1  # in [-1, 1]
            middle = (middle + between(draws[name], -0.5, 0.5) * scale).clamp(-room, room)
            chosen = (draws["centre"] < centred) & (source.num_boxes > 0)
            theta[:, axis, 2] = torch.where(chosen, middle, theta[:, axis, 2])
    images, masks = warp(images, masks, theta)
    return recolour(images, draws, colour), masks


def _instance(draws: dict, source: Source) -> Tensor:
    """(N, 4) x0, y0, x1, y1 of the instance that was drawn for each image."""
    picked = (draws["instance"] * source.num_boxes).long()
    return source.boxes[torch.arange(len(picked), device=picked.device), picked]


def warp(images: Tensor, masks: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Sample images (bilinear) and masks (nearest) on one affine grid; theta (N, 2, 3) as F.affine_grid takes it."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)  # (N, H, W, 2)
    reflect = {"padding_mode": "reflection", "align_corners": False}
    masks = F.grid_sample(masks[:, None].float(), grid, mode="nearest", **reflect)[:, 0].long()
    return F.grid_sample(images, grid, mode="bilinear", **reflect), masks


def recolour(images: Tensor, draws: dict, colour: float) -> Tensor:
    """Scale brightness, contrast (about the image's mean), saturation by up to `colour`: a 3x3 matrix and an offset."""
    names = "brightness", "contrast", "saturation"
    brightness, contrast, saturation = (between(draws[name], 1 - colour, 1 + colour)[:, None, None] for name in names)
    offset = (1 - contrast) * brightness * images.mean(dim=(1, 2, 3))[:, None, None]
    grey, identity = images.new_full((3, 3), 1 / 3), torch.eye(3, dtype=images.dtype, device=images.device)
    matrix = brightness * contrast * (saturation * identity + (1 - saturation) * grey)  # (N, 3, 3)
    return torch.baddbmm(offset, matrix, images.flatten(2)).view_as(images).clamp_(0, 1)


@augmentation("apply aim instance x y width height texture red green blue donor roll_x roll_y grain")
def occlude(
    images: Tensor,
    masks: Tensor,
    draws: dict,
    source: Source,
    occlusion: float,
    aimed: float,
    occluder_size: float,
    occluded: str,
) -> tuple[Tensor, Tensor]:
    """Cover one rectangle of some images with flat colour, brushed metal, noise, or a patch of another image.

    occlusion, aimed  shares in [0, 1]: of images with an occluder, and of occluders placed on an instance
    occluder_size     longest side of the others, as a share of the image's; the shortest is a tenth
    occluded          "keep": covered pixels keep their class, which the network must infer; "void": they leave the loss
    After Zhong et al., "Random Erasing", AAAI 2020, and Fong & Vedaldi, "Occlusions for Effective Data Augmentation",
    ICCVW 2019; aiming at instances is ours.
    """
    if occlusion == 0:
        return images, masks
    height, width = images.shape[-2:]
    ys = torch.arange(height, device=images.device)[None, :, None]  # (1, H, 1)
    xs = torch.arange(width, device=images.device)[None, None, :]  # (1, 1, W)
    x0, x1, y0, y1 = _rectangles(draws, source, aimed, occluder_size, images.shape[-2:])[..., None, None]
    covered = (xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1) & (draws["apply"] < occlusion)[:, None, None]  # (N, H, W)
    texture = _texture(draws, source.donor_images(draws["donor"]), ys, xs)
    images = torch.where(covered[:, None], texture, images)
    return images, masks.masked_fill(covered, IGNORE_INDEX) if occluded == "void" else masks.clone()


def _rectangles(draws: dict, source: Source, aimed: float, largest: float, shape: tuple[int, int]) -> Tensor:
    """(4, N) x0, x1, y0, y1: 0.1 to `largest` times the image's sides, or 0.4 to 1 times those of an instance."""
    box = _instance(draws, source)
    on_instance = (draws["aim"] < aimed) & (source.num_boxes > 0)
    corners = []
    for axis, (shift, extent, side) in enumerate((("x", "width", shape[1]), ("y", "height", shape[0]))):
        low = torch.where(on_instance, box[:, axis], 0.0)
        span = torch.where(on_instance, box[:, axis + 2] - box[:, axis], float(side))
        share = torch.where(on_instance, between(draws[extent], 0.4, 1.0), between(draws[extent], 0.1, largest))
        start = low + draws[shift] * span * (1 - share)
        corners += [start, start + share * span]
    return torch.stack(corners)


def _texture(draws: dict, donor_images: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """(N, 3, H, W): each sample's occluder as a full image."""
    height, width = donor_images.shape[-2:]
    roll_x = (draws["roll_x"] * width).long()[:, None, None]
    roll_y = (draws["roll_y"] * height).long()[:, None, None]
    ys, xs = (ys + roll_y) % height, (xs + roll_x) % width  # (N, H, 1), (N, 1, W)
    colour = torch.stack([draws[name] for name in ("red", "green", "blue")], dim=1)[:, :, None, None]
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)).to(donor_images)
    sheen = torch.sin(2 * math.pi * (xs / width + 0.3 * ys / height))  # (N, H, W)
    metallic = (0.55 + 0.25 * sheen + 0.2 * (noise[0, ys, 0] - 0.5))[:, None] * (0.85 + 0.3 * (colour - 0.5))
    batch = torch.arange(len(donor_images), device=donor_images.device)[:, None, None]
    patch = donor_images.movedim(1, -1)[batch, ys, xs].movedim(-1, 1)
    texture = (draws["texture"] * len(TEXTURES)).long()
    grain = (2 ** (draws["grain"] * GRAINS).long())[:, None, None]
    flat, noisy = colour.expand_as(donor_images), noise[:, ys // grain, xs // grain].movedim(0, 1)
    return torch.stack([flat, metallic, noisy, patch])[texture, batch[:, 0, 0]].clamp(0, 1)
