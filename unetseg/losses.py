"""Losses as ratios of sums over the global batch; void pixels are in no sum, and a batch that is all void has loss 0.

A loss takes logits (N, C, H, W) float, mask (N, H, W) int64 with class ids 0..C-1 or IGNORE_INDEX, class_weights (C,)
or None for equal weights, all_sum, which adds a tensor up over all processes (every sum must go through it), and any
settings by their names. To add a loss, write it here and enter it in LOSSES.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from .classes import IGNORE_INDEX

AUXILIARY = 0.3  # weight of the loss of a coarser output


def this_process(tensor: Tensor) -> Tensor:
    """`all_sum` where there is one process."""
    return tensor


def cross_entropy(
    logits: Tensor, mask: Tensor, class_weights: Tensor | None = None, all_sum: Callable = this_process
) -> Tensor:
    """Cross-entropy averaged over the valid pixels, each weighted by its class."""
    # per pixel, then the sum: PyTorch's own sum is not deterministic on CUDA
    loss = F.cross_entropy(logits, mask, class_weights, ignore_index=IGNORE_INDEX, reduction="none").sum()
    valid = mask != IGNORE_INDEX
    if class_weights is None:
        return all_sum(loss) / all_sum(valid.sum()).clamp(min=1)
    weight = (class_weights[mask.where(valid, 0)] * valid).sum()
    return all_sum(loss) / all_sum(weight).clamp(min=class_weights.min())


def dice_loss(
    logits: Tensor, mask: Tensor, class_weights: Tensor | None = None, all_sum: Callable = this_process
) -> Tensor:
    """1 - soft Dice, averaged over the classes present in the batch's masks; in [0, 1]. Every class counts alike.

    Dice of a class is 2 Σ p·t / (Σ p + Σ t) over all valid pixels of the batch.
    After Milletari et al., "V-Net", 3DV 2016; classes absent from the batch are left out.
    """
    valid = (mask != IGNORE_INDEX).unsqueeze(1)  # (N, 1, H, W)
    truth = F.one_hot(mask.where(mask != IGNORE_INDEX, 0), logits.shape[1])  # (N, H, W, C)
    truth = truth.movedim(-1, 1) * valid  # (N, C, H, W)
    probs = logits.softmax(dim=1) * valid  # (N, C, H, W)
    overlap = all_sum((probs * truth).sum(dim=(0, 2, 3)))  # (C,)
    num_pixels = all_sum(truth.sum(dim=(0, 2, 3)))  # (C,)
    total = all_sum(probs.sum(dim=(0, 2, 3))) + num_pixels
    present = num_pixels > 0
    loss = 1 - 2 * overlap / total.clamp(min=1e-6)
    return loss.where(present, 0).sum() / present.sum().clamp(min=1)


def ce_dice(
    logits: Tensor, mask: Tensor, class_weights: Tensor | None = None, all_sum: Callable = this_process, dice_share=0.5
) -> Tensor:
    """(1 - dice_share) · cross-entropy + dice_share · Dice; dice_share in [0, 1]."""
    ce = cross_entropy(logits, mask, class_weights, all_sum)
    return (1 - dice_share) * ce + dice_share * dice_loss(logits, mask, class_weights, all_sum)


def deep_supervision(loss_fn: Callable, outputs: Tensor | list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss, and the loss of the logits alone; the former adds AUXILIARY times that of each coarser output,
    which has half the size of the one before, against the pixel under each centre."""
    logits, *coarser = outputs if isinstance(outputs, list) else [outputs]
    main = total = loss_fn(logits, mask)
    for level, output in enumerate(coarser, 1):
        step = 2**level
        coarse = mask[:, step // 2 :: step, step // 2 :: step]
        total = total + AUXILIARY * loss_fn(output[..., : coarse.shape[1], : coarse.shape[2]], coarse)
    return total, main.detach()


LOSSES = {"ce": cross_entropy, "ce_dice": ce_dice, "dice": dice_loss}
