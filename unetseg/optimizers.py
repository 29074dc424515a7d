"""The optimisers, and the table of them: AdamW, and Muon for the 3x3 filters."""

import torch
from torch import Tensor

MOMENTUM = 0.95
NEWTON_SCHULZ = 5 * [(3.4445, -4.7750, 2.0315)]  # coefficients of each iteration, by Jordan


class Muon(torch.optim.AdamW):
    """AdamW for all but the 3x3 filters, which move along their momentum with all its singular values made equal.

    After Jordan et al., "Muon", 2024; the size of a step is AdamW's, as in Liu et al., "Muon is Scalable for LLM
    Training", 2025. Like the fused AdamW it leaves everything as it is where `found_inf` is 1.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            filters: dict[int, list[Tensor]] = {}  # by the matrix's shorter side: equal ones are computed together
            for p in group["params"]:
                if p.ndim == 4 and p.shape[-1] == 3 and p.grad is not None:
                    filters.setdefault(min(len(p), p[0].numel()), []).append(p)
            for same in filters.values():
                self._step_filters(same, group["lr"], group["weight_decay"])
        super().step(closure)

    def _step_filters(self, filters: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        finite = 1 - getattr(self, "found_inf", torch.zeros((), device=filters[0].device))
        matrices = []
        for p in filters:
            if not self.state[p]:  # AdamW loads no state without a step
                self.state[p].update(momentum=torch.zeros_like(p), step=torch.zeros(()))
            momentum = self.state[p]["momentum"]
            momentum.lerp_(torch.where(finite > 0, p.grad, momentum), 1 - MOMENTUM)
            p.grad = None  # nothing is left for AdamW
            matrices.append(momentum.flatten(1))
        for p, matrix, factor in zip(filters, matrices, whitening(matrices), strict=True):
            size = finite * lr
            p.mul_(1 - size * weight_decay)
            moved = factor @ matrix if len(factor) == len(matrix) else matrix @ factor
            p.sub_(moved.view(p.shape) * (size * 0.2 * max(matrix.shape) ** 0.5))


def whitening(matrices: list[Tensor]) -> Tensor:
    """(K, S, S), by which K matrices with a shorter side S are multiplied on that side, to have singular values near 1:
    Newton-Schulz iterations on the Gram matrices alone, which are small, and in fp32 on every device."""
    grams = torch.stack([wide @ wide.T for wide in (min(matrix, matrix.T, key=len) for matrix in matrices)])
    squares = grams.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=1e-14)[:, None, None]  # of the Frobenius norms
    identity = torch.eye(grams.shape[1], device=grams.device)
    grams, product = grams / squares, identity / squares.sqrt()
    for a, b, c in NEWTON_SCHULZ:
        step = a * identity + b * grams + c * grams @ grams
        product, grams = step @ product, step @ grams @ step
    return product


OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}
