"""Losses as ratios of sums over the whole batch; void pixels are in none of the sums, and a batch of void has loss 0.

All take logits (N, C, H, W) float and mask (N, H, W) int64 with class ids 0..C-1 or `ignore_index`.
"""

from torch import Tensor
from torch.nn import functional as F

from .classes import IGNORE_INDEX


def cross_entropy(
    logits: Tensor, mask: Tensor, class_weights: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Cross-entropy averaged over the valid pixels, each weighing as much as its class.

    class_weights  (C,) float, or None for equal weights
    """
    # per pixel, then the sum: PyTorch's own sum is not deterministic on CUDA
    total = F.cross_entropy(logits.float(), mask, class_weights, ignore_index=ignore_index, reduction="none").sum()
    valid = mask != ignore_index
    if class_weights is None:
        return total / valid.sum().clamp(min=1)
    return total / (class_weights[mask.where(valid, 0)] * valid).sum().clamp(min=class_weights.min())


def dice_loss(logits: Tensor, mask: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """1 - soft Dice, averaged over the classes present in the batch's masks; in [0, 1].

    Dice of a class is 2 Σ p·t / (Σ p + Σ t) over all valid pixels of the batch.
    After Milletari et al., "V-Net", 3DV 2016; classes absent from the batch are left out.
    """
    num_classes = logits.shape[1]
    valid = (mask != ignore_index).unsqueeze(1)  # (N, 1, H, W)
    truth = F.one_hot(mask.where(mask != ignore_index, 0), num_classes)  # (N, H, W, C)
    truth = truth.movedim(-1, 1) * valid  # (N, C, H, W)
    probs = logits.float().softmax(dim=1) * valid  # (N, C, H, W)
    overlap = (probs * truth).sum(dim=(0, 2, 3))  # (C,)
    size = probs.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    present = truth.any(dim=3).any(dim=2).any(dim=0)
    loss = 1 - 2 * overlap / size.clamp(min=1e-6)
    return loss.where(present, 0).sum() / present.sum().clamp(min=1)


def ce_dice(
    logits: Tensor,
    mask: Tensor,
    class_weights: Tensor | None = None,
    dice_share: float = 0.5,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """(1 - dice_share) · cross-entropy + dice_share · Dice; dice_share in [0, 1]."""
    ce = cross_entropy(logits, mask, class_weights, ignore_index)
    return (1 - dice_share) * ce + dice_share * dice_loss(logits, mask, ignore_index)
