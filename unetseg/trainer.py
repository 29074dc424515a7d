"""One step of training, and all that a step changes: safe against numbers that are not finite and too little memory."""

import reprlib
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import memory, processes
from .device import FORMATS, autocast

LossFn = Callable[[Tensor, Tensor], Tensor]


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why, and where the best weights so far are."""


class Trainer:
    """A model with all that changes while it trains: optimiser, schedule, loss scale, size of the parts of a batch.

    AdamW (Loshchilov & Hutter, ICLR 2019) under the one-cycle schedule (Smith, 2018), gradients clipped to norm 1.

    precision, memory_format, compiled  as in device.Choice
    """

    def __init__(
        self,
        model: nn.Module,
        num_steps: int,
        lr: float,
        weight_decay: float,
        precision: str,
        memory_format: str = "channels_last",
        compiled: bool = False,
    ) -> None:
        memory.keep_freed()
        self.device = next(model.parameters()).device
        self.model, self.precision = model.to(memory_format=FORMATS[memory_format]), precision
        self.compiled, self.largest = torch.compile(model, dynamic=False) if compiled else model, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        self.schedule = {"max_lr": lr, "total_steps": max(num_steps, 6), "pct_start": 0.2, "cycle_momentum": False}
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, **self.schedule)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.part = sys.maxsize  # images that go through the network at once
        self.statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]  # of BatchNorm

    @property
    def lr(self) -> float:
        return self.scheduler.get_last_lr()[0]

    def state(self) -> dict:
        """All that changes while training; what settings decide is not in it."""
        moments, numbers = self.optimizer.state_dict()["state"], {"steps": self.scheduler.last_epoch, "part": self.part}
        return {"model": self.model.state_dict(), "moments": moments, "scaler": self.scaler.state_dict(), **numbers}

    def load(self, state: dict) -> None:
        """Take over a state from a file. Raises ValueError and the like for one that does not fit."""
        steps, part = state["steps"], state["part"]
        if not (type(steps) is int and 0 <= steps <= self.schedule["total_steps"] and type(part) is int and part > 0):
            raise ValueError(f"{reprlib.repr(steps)} steps, parts of {reprlib.repr(part)} images")
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": self._moments(state["moments"]), "param_groups": groups})
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, **self.schedule, last_epoch=steps - 1)
        self.scaler.load_state_dict(
            {key: type(now)(state["scaler"][key]) for key, now in self.scaler.state_dict().items()}
        )
        self.part = part

    def _moments(self, saved: dict) -> dict:
        """AdamW's moments in memory of our own: the fused optimiser trusts their shapes."""
        weights, moments = list(self.model.parameters()), {}
        for number, found in saved.items():
            weight = weights[number]
            if not found["exp_avg"].shape == found["exp_avg_sq"].shape == weight.shape:
                raise ValueError(f"moments of another shape than weight {number}")
            moments[number] = {key: torch.empty_like(weight).copy_(found[key]) for key in ("exp_avg", "exp_avg_sq")}
            moments[number]["step"] = torch.tensor(found["step"].item())
        return moments

    def step(self, images: Tensor, masks: Tensor, loss_fn: LossFn) -> tuple[Tensor, Tensor]:
        """One update; returns the loss, and whether it and the gradient were finite, both () and still on the device.

        With several processes each gives its part of the batch; loss and update are those of the whole batch.
        Where they were not, weights, optimiser and BatchNorm's statistics stay as they were; the schedule moves on.
        """
        before = [buffer.clone() for buffer in self.statistics]
        loss = self._backward(images, masks, loss_fn, before)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        finite = loss.isfinite() & norm.isfinite()
        self.optimizer.found_inf = (~finite).float()  # the fused optimiser looks at it, without making a GPU wait
        self.optimizer.step()
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, old in zip(self.statistics, before):
            buffer.copy_(torch.where(finite, buffer, old))
        return loss, finite

    def _backward(self, images: Tensor, masks: Tensor, loss_fn: LossFn, statistics: list[Tensor]) -> Tensor:
        """Gradients of the loss; where memory does not suffice, again in parts of half as many images."""
        while True:
            try:
                return self._backward_in_parts(images, masks, loss_fn, statistics)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0][:200]  # not the error: it would keep the tensors alive
            largest = min(self.part, len(images))
            if processes.count() > 1:
                raise TrainingStopped(f"out of memory ({reason}); choose a smaller batch, or more processes")
            if largest == 1:
                smaller = "choose fewer channels or smaller images"
                raise TrainingStopped(f"out of memory with one image at a time ({reason}); {smaller}")
            self.part = (largest + 1) // 2
            self.optimizer.zero_grad(set_to_none=True)
            self._restore(statistics)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory with {largest} images at a time; going on with {self.part} at a time, same batch size "
                "(BatchNorm then sees fewer images at once)",
                stacklevel=3,
            )

    def _backward_in_parts(self, images: Tensor, masks: Tensor, loss_fn: LossFn, statistics: list[Tensor]) -> Tensor:
        """Gradients of the loss over the whole batch, which goes through the network in parts; returns the loss.

        With several parts, the loss and its gradient at the logits are taken on all of them, before each part goes
        through once more. After Gao et al., "Scaling Deep Contrastive Learning Batch Size", RepL4NLP 2021.
        """
        self.largest = max(self.largest, len(images))  # an epoch's last, smaller batch is not worth compiling for
        model = self.compiled if len(images) == self.largest else self.model
        if processes.count() > 1:
            return self._backward_together(model, images, masks, loss_fn)
        if self.part >= len(images):
            loss = loss_fn(forward(model, images, self.precision), masks)
            self.scaler.scale(loss).backward()
            return loss.detach()
        with torch.no_grad():
            logits = forward(self.model, images, self.precision, self.part)
        loss = loss_fn(logits.requires_grad_(), masks)
        self.scaler.scale(loss).backward()
        self._restore(statistics)  # the second time through counts
        for part, gradient in zip(images.split(self.part), logits.grad.split(self.part)):
            forward(self.model, part, self.precision).backward(gradient)
        return loss.detach()

    def _backward_together(self, model: nn.Module, images: Tensor, masks: Tensor, loss_fn: LossFn) -> Tensor:
        """Gradients of the loss over the whole batch, of which each process has a part; returns the loss.

        Every process takes the loss on the logits of all, and sends its own part of the gradient back through its
        network; the sum over the processes is the gradient. BatchNorm's statistics are those of one common BatchNorm
        on GPUs, and on CPUs the mean of the processes' own, each counting as many times as it has images.
        """
        logits = forward(model, images, self.precision if len(images) else "fp32")  # SyncBatchNorm: none has no dtype
        everyone, truth = processes.gather_batch(logits.detach().float(), masks)
        loss = loss_fn(everyone.requires_grad_(), truth)
        self.scaler.scale(loss).backward()
        logits.backward(processes.own(everyone.grad).to(logits.dtype))
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        shared = [weight.grad for weight in self.model.parameters()]
        if not images.is_cuda:
            shared += [buffer.mul_(len(images) / len(truth)) for buffer in self.statistics]  # a part may be empty
        processes.add_up(shared)
        return loss.detach()

    def _restore(self, statistics: list[Tensor]) -> None:
        for buffer, old in zip(self.statistics, statistics):
            buffer.copy_(old)


def forward(model: nn.Module, images: Tensor, precision: str, part: int = sys.maxsize) -> Tensor:
    """Logits (N, C, H, W) of images (N, 3, H, W), `part` of them at a time."""
    with autocast(images.device, precision):
        if part >= len(images):
            return model(images)
        return torch.cat([model(some) for some in images.split(part)])


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that the GPU's or the machine's memory did not suffice."""
    said = ("can't allocate memory", "could not create a")  # PyTorch's allocator on a CPU, and oneDNN
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in said)
