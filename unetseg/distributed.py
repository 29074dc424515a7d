"""What the processes of one training exchange, under torchrun; every function does nothing in a single process.

Each process holds the whole model, takes its share of every batch, and ends a step with the same weights as the others.
"""

import datetime
import os
import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .files import UserError


def launched() -> bool:
    """Whether torchrun started this process as one of several; RANK and WORLD_SIZE alone may be left over."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def begin() -> None:
    """Join the other processes. On GPUs each takes the one with its number; all but the first become silent."""
    if not launched() or dist.is_initialized():
        return
    gpus, here = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < gpus < here:
        raise UserError(f"expected a GPU for each of the {here} processes on this machine, found {gpus}; start {gpus}")
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cuda:nccl,cpu:gloo" if gpus else "gloo", timeout=datetime.timedelta(minutes=10))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        warnings.simplefilter("ignore")


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(indices: Tensor) -> Tensor:
    """This process's share of a batch: as many as the others have, or one less."""
    return indices.tensor_split(world())[rank()]


class AllSum(torch.autograd.Function):
    """The sum over all processes, of values and of their gradients."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return AllSum.forward(ctx, grad)


def all_sum(value: Tensor | int) -> Tensor | int:
    """The sum over all processes; gradients of a tensor flow back to each of them."""
    if world() == 1:
        return value
    return AllSum.apply(value) if isinstance(value, Tensor) else int(AllSum.apply(torch.tensor(value)))


def average_(vector: Tensor, weight: int) -> None:
    """Replace a vector by its weighted mean over the processes; on GPUs SyncBatchNorm keeps its parts equal."""
    if world() > 1 and len(vector) and not vector.is_cuda:
        total = all_sum(torch.cat([vector, torch.ones(1)]) * weight)
        vector.copy_(total[:-1] / total[-1])


def from_first(make: Callable[[], object]) -> object:
    """What `make` returns or raises in the first process, for all of them."""
    if world() == 1:
        return make()
    found: list = [None, None]
    try:
        found[0] = make() if rank() == 0 else None
    except Exception as error:
        found[1] = error
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    if found[1] is not None:
        raise found[1]
    return found[0]


def wrap(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over the processes and, on GPUs, common batch statistics."""
    if world() == 1:
        return model
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if next(model.parameters()).is_cuda else model
    return nn.parallel.DistributedDataParallel(model)
