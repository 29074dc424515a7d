"""Trained weights at work: predictions for images of any size."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint
from .data import Batches, SegmentationSet
from .device import pick_device
from .files import make_folder, write_bytes
from .images import cv2, shrink
from .settings import Settings
from .train import forward


def trained_model(run_or_weights: Path) -> tuple[nn.Module, dict]:
    """The trained network, ready to predict on the best device, and what it was trained with."""
    model, about = checkpoint.load_model(run_or_weights)
    return model.to(pick_device(), memory_format=torch.channels_last).eval(), about


def augmented(settings: Settings, train_set: SegmentationSet, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees of the image with the most people: images (n, H, W, 3) and masks (n, H, W), uint8, first as
    they are, then as in n - 1 epochs, each with an occluder where the settings have any."""
    people = [train_set.class_set.names.index(name) for name in train_set.class_set.people]
    index = int(train_set.num_pixels[:, people].sum(axis=1).argmax())
    kept = slice(index, index + 1)
    one = replace(train_set, images=train_set.images[kept], masks=train_set.masks[kept])
    views = [one.batch(torch.tensor([0]), torch.device("cpu"))]
    batches = Batches(one, 1, torch.device("cpu"), replace(settings, occlusion=float(settings.occlusion > 0)))
    views += [next(batches.epoch(number))[:2] for number in range(1, count)]
    images, masks = (torch.cat(parts) for parts in zip(*views))
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), masks.to(torch.uint8).numpy()


def spread(dataset: SegmentationSet, count: int) -> Tensor:
    """Indices of up to `count` images, evenly spread."""
    return torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long()


@torch.inference_mode()
def predictions(model: nn.Module, dataset: SegmentationSet, count: int, precision: str = "fp32") -> tuple:
    """Images (n, H, W, 3) uint8, masks and predictions (n, H, W) uint8 of up to `count` images, evenly spread."""
    images, masks = dataset.batch(spread(dataset, count), next(model.parameters()).device)
    preds = forward(model.eval(), images, precision).argmax(dim=1)
    shown = (images * 255).round().permute(0, 2, 3, 1), masks, preds
    return tuple(tensor.to("cpu", torch.uint8).numpy() for tensor in shown)


@torch.inference_mode()
def predict(
    model: nn.Module, image: np.ndarray, size: tuple[int, int], precision="fp32", tiles: int = 1, flip: bool = False
) -> np.ndarray:
    """Class ids (H, W) uint8 for an RGB image (H, W, 3) uint8 of any size.

    size   width and height that the model was trained at: the image is brought there by area averaging, and the logits,
           not the classes, are brought back
    tiles  windows along each side, each of that size, overlapping by a quarter; 1 shows the network the whole image
    flip   average the probabilities over the image and its mirror image
    """
    canvas = tuple(side + (tiles - 1) * (3 * side // 4) for side in size)
    small = torch.from_numpy(shrink(image, canvas)).to(next(model.parameters()).device)
    small = small.permute(2, 0, 1)[None] / 255  # (1, 3, h, w)
    if tiles == 1:
        logits = class_scores(model, small, precision, flip)
    else:
        tent = [torch.bartlett_window(side + 2, periodic=False)[1:-1].to(small) for side in size]
        weight, logits = tent[1][:, None] * tent[0], None
        for row, column in product(range(tiles), repeat=2):
            y, x = row * (3 * size[1] // 4), column * (3 * size[0] // 4)
            place = (..., slice(y, y + size[1]), slice(x, x + size[0]))
            probs = class_scores(model, small[place], precision, flip).softmax(dim=1) * weight
            logits = small.new_zeros(1, probs.shape[1], *small.shape[2:]) if logits is None else logits
            logits[place] += probs  # the class with the largest sum wins; no need to divide
    return _classes_at(logits[0].cpu().numpy(), image.shape[1::-1])


def class_scores(model: nn.Module, images: Tensor, precision: str, flip: bool) -> Tensor:
    """Logits (N, C, H, W); with `flip`, logarithms of the probabilities summed over an image and its mirror image."""
    logits = forward(model, images, precision)
    if flip:
        mirrored = forward(model, images.flip(-1), precision).flip(-1)
        logits = torch.logaddexp(logits.log_softmax(dim=1), mirrored.log_softmax(dim=1))
    return logits


def _classes_at(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class with the highest of the logits (C, h, w) float32, brought linearly to `size`: (height, width) uint8."""
    highest, pred = None, np.zeros(size[::-1], np.uint8)
    for class_id, logit in enumerate(logits):  # one by one: all classes at full size would take 28 bytes a pixel
        large = cv2.resize(logit, size, interpolation=cv2.INTER_LINEAR)
        highest = large if highest is None else highest
        wins = cv2.compare(large, highest, cv2.CMP_GT)  # 255 where true
        cv2.max(pred, cv2.min(wins, class_id), pred)
        cv2.max(large, highest, highest)
    return pred


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write ids (H, W) or RGB (H, W, 3), uint8, as the suffix says: .png, or .jpg of quality 95; makes its folder."""
    _, encoded = cv2.imencode(path.suffix, picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    write_bytes(make_folder(path.parent) / path.name, encoded)
