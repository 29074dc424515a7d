"""The processes that train together, under torchrun: who is who, and what they exchange. One alone exchanges nothing.

Each holds a whole model, takes its part of every batch, and ends a step with the same weights as the others. The first
one writes, logs and speaks.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import capability

Value = TypeVar("Value")
LAUNCHER = "UNETSEG_LAUNCHER"  # environment variable: the process whose `launch` has started these


def begin() -> None:
    """Join the others, if torchrun (or the like) has started this process as one of several.

    On GPUs each takes that of its number on its machine. All but the first are silent from here on.
    Raises ValueError when there are fewer GPUs than processes, NoKernels for one that cannot be used.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    for starter in {os.getppid(), int(os.environ.get(LAUNCHER, 0))} - {0}:  # torchrun and, where it was, `launch`
        threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
    gpus, here = torch.cuda.device_count(), on_this_machine()
    if 0 < gpus < here:
        raise ValueError(f"expected a GPU for each of the {here} processes on this machine, found {gpus}; start {gpus}")
    if gpus:
        capability.require_kernels(int(os.environ.get("LOCAL_RANK", 0)))
    from accelerate import PartialState  # here, because it is slow to import and few need it

    PartialState(**{"backend": "cuda:nccl,cpu:gloo"} if gpus else {"cpu": True})
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        warnings.simplefilter("ignore")


def _end_with(process_id: int) -> None:
    """End this process with that one: killed, it would leave us at work, with GPUs and run folder taken."""
    with contextlib.suppress(psutil.NoSuchProcess):
        starter = psutil.Process(process_id)
        while starter.is_running() and starter.status() != psutil.STATUS_ZOMBIE:  # one that nobody has waited for yet
            time.sleep(1)
    os._exit(1)


def launch(number: int, arguments: Sequence[str]) -> int:
    """Run `python -m unetseg` with these arguments in so many processes on this machine; returns the exit status.

    Its progress and warnings are shown; what it prints at the end is for the caller to say.
    """
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), LAUNCHER: str(os.getpid())}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))  # torchrun's own is 1
    command = [sys.executable, *several, "-m", "unetseg", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:  # which has not reached torchrun, in a session of its own
        process.send_signal(signal.SIGINT)  # once: it passes it on, and gives them thirty seconds to save
        process.wait()
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def on_this_machine() -> int:
    """How many of them run here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def own(indices: Tensor) -> Tensor:
    """This process's part of a batch: as many as the others', or one less."""
    return indices.tensor_split(count())[rank()]


def gather(part: Tensor) -> Tensor:
    """The whole batch (N, ...), in order, of which each process has a part (n, ...); n may be 0."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(part)]))
    parts = [
        part.contiguous() if who == rank() else part.new_empty(int(n), *part.shape[1:]) for who, n in enumerate(sizes)
    ]
    for who, piece in enumerate(parts):
        if len(piece):
            dist.broadcast(piece, who)  # all_gather takes no parts of different sizes on CPUs
    return torch.cat(parts)


def gather_batch(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and masks of the whole batch."""
    if count() == 1:
        return logits, masks
    return gather(logits), gather(masks.to(torch.uint8)).long()


def add_up(tensors: list[Tensor]) -> None:
    """Replace each of these tensors of one dtype and device by its sum over the processes."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view(tensor.shape))


def total(number: int) -> int:
    """The sum of the processes' numbers."""
    return _agree(number, dist.ReduceOp.SUM)


def highest(number: int) -> int:
    """The highest of the processes' numbers."""
    return _agree(number, dist.ReduceOp.MAX)


def _agree(number: int, how: dist.ReduceOp) -> int:
    if count() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, how)
    return int(tensor)


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` returns, or raises, in the first process, for all of them."""
    if count() == 1:
        return make()
    found: list = [None, None]
    if is_first():
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    if found[1] is not None:
        raise found[1]
    return found[0]


def synchronise(model: nn.Module) -> nn.Module:
    """The model, whose BatchNorm on GPUs takes its statistics over the processes; on CPUs it cannot."""
    on_gpu = next(model.parameters()).is_cuda
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if count() > 1 and on_gpu else model
