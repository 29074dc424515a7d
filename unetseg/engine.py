"""The training loop: `fit` is `train_one_epoch` and `evaluate`, epoch after epoch, and keeps the best."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .classes import IGNORE_INDEX
from .device import autocast
from .metrics import confusion_matrix, scores

LossFn = Callable[[Tensor, Tensor], Tensor]


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why, and where the best weights so far are."""


class NotFinite(ArithmeticError):
    """A loss is NaN or infinite."""


@dataclass
class Evaluation:
    """What one pass over a split gives: mean loss per image, and the (C + 1, C) confusion matrix."""

    loss: float
    confusion: np.ndarray
    images_per_second: float


class Trainer:
    """A model with all that changes while it trains: optimiser, schedule, loss scale.

    AdamW (Loshchilov & Hutter, ICLR 2019) under the one-cycle schedule (Smith, 2018), gradients clipped to norm 1.
    """

    def __init__(self, model: nn.Module, num_steps: int, lr: float, weight_decay: float, precision: str) -> None:
        self.device = next(model.parameters()).device
        self.model, self.precision = model.to(memory_format=torch.channels_last), precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=lr, total_steps=max(num_steps, 6), pct_start=0.2, cycle_momentum=False
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    @property
    def lr(self) -> float:
        return self.scheduler.get_last_lr()[0]

    @property
    def parts(self) -> dict:
        return {key: getattr(self, key) for key in ("model", "optimizer", "scheduler", "scaler")}

    def state(self) -> dict:
        return {key: part.state_dict() for key, part in self.parts.items()}

    def load(self, state: dict) -> None:
        for key, part in self.parts.items():
            part.load_state_dict(state[key])

    def step(self, images: Tensor, masks: Tensor, loss_fn: LossFn) -> Tensor:
        """One update; returns the loss, still on the device."""
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.precision):
            logits = self.model(images)
        loss = loss_fn(logits, masks)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train_one_epoch(
    trainer: Trainer, batches: Iterable[tuple[Tensor, Tensor]], loss_fn: LossFn, progress: tqdm
) -> float:
    """Train on every batch once; returns the mean loss per image. Raises NotFinite."""
    trainer.model.train()
    total, num_images, looked = torch.zeros((), device=trainer.device), 0, time.perf_counter()
    for images, masks in batches:
        total += trainer.step(images, masks, loss_fn) * len(images)
        num_images += len(images)
        progress.update(len(images))
        if time.perf_counter() - looked > 1:  # reading the loss makes a GPU wait, so only now and then
            looked = time.perf_counter()
            progress.set_postfix(progress.scores | {"loss": f"{_finite(total.item()) / num_images:.3f}"})
    return _finite(total.item()) / num_images


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise NotFinite(f"the loss became {value}")
    return value


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    loss_fn: LossFn,
    precision: str = "fp32",
    void: str = "ignore",
) -> Evaluation:
    """Score a model on batches whose masks mark void as IGNORE_INDEX; the counts do not depend on the batch size.

    void  the rule for the loss; the confusion matrix serves both
    """
    model.eval()
    device = next(model.parameters()).device
    confusion = torch.zeros(num_classes + 1, num_classes, dtype=torch.int64, device=device)
    total, num_images, start = torch.zeros((), device=device), 0, time.perf_counter()
    for images, masks in batches:
        with autocast(device, precision):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        truth = masks.where(masks != IGNORE_INDEX, 0) if void == "background" else masks
        total += loss_fn(logits, truth) * len(images)
        confusion += confusion_matrix(logits.argmax(dim=1), masks, num_classes)
        num_images += len(images)
    loss = total.item() / max(num_images, 1)
    return Evaluation(loss, confusion.cpu().numpy(), num_images / (time.perf_counter() - start))


@dataclass(frozen=True)
class Job:
    """What `fit` needs to know besides the model, the loss and the batches."""

    run: Path
    num_epochs: int
    names: tuple[str, ...]  # of the classes
    void: str  # the rule that val loss and val mIoU are taken under
    metadata: dict[str, str]  # stored with the best weights


def fit(
    trainer: Trainer,
    loss_fn: LossFn,
    train_batches,
    val_batches,
    job: Job,
    log: Callable[[dict], None] = lambda record: None,
) -> list[dict]:
    """Train to the job's last epoch, from the last one saved in its run folder; returns the history.

    train_batches, val_batches  with .dataset and .epoch(number) -> iterable of (images, masks)
    log                         called after each epoch with its row of history and, under "scores", the val scores
    Raises TrainingStopped on a loss that is not finite; what was saved stays.
    """
    history = resume(trainer, job.run)
    size = len(train_batches.dataset)
    bar = {"total": job.num_epochs * size, "initial": len(history) * size, "unit": "img", "mininterval": 1}
    with tqdm(desc=job.run.name, **bar) as progress:
        progress.scores = {}
        for epoch in range(len(history) + 1, job.num_epochs + 1):
            try:
                row, score = run_epoch(trainer, loss_fn, train_batches, val_batches, job, epoch, progress)
            except NotFinite as error:
                kept = f"the best weights so far are in {job.run}" if history else "no epoch was finished"
                raise TrainingStopped(f"{job.run.name}: {error} in epoch {epoch}; {kept}; try a lower lr") from None
            history.append(row)
            save(trainer, job, history)
            best = max(row["val_miou"] for row in history)
            progress.scores = {"epoch": epoch, "mIoU": f"{row['val_miou']:.3f}", "best": f"{best:.3f}"}
            log(row | {"scores": score})
    return history


def run_epoch(
    trainer: Trainer, loss_fn: LossFn, train_batches, val_batches, job: Job, epoch: int, progress: tqdm
) -> tuple[dict, dict]:
    """Train on every batch once and evaluate; returns the row of history and the val scores. Raises NotFinite."""
    start = time.perf_counter()
    train_loss = train_one_epoch(trainer, train_batches.epoch(epoch), loss_fn, progress)
    speed = len(train_batches.dataset) / (time.perf_counter() - start)
    result = evaluate(trainer.model, val_batches.epoch(), len(job.names), loss_fn, trainer.precision, job.void)
    score = scores(result.confusion, job.names, job.void)
    row = {"epoch": epoch, "train_loss": train_loss, "val_loss": _finite(result.loss), "val_miou": score["miou"] or 0.0}
    row |= {"lr": trainer.lr, "seconds": time.perf_counter() - start, "images_per_second": speed}
    return row, score


def resume(trainer: Trainer, run: Path) -> list[dict]:
    """Put the trainer where the run folder's last saved epoch left it; returns the history so far."""
    saved = checkpoint.load_state(run / checkpoint.STATE)
    if saved is None:
        return []
    trainer.load(saved["trainer"])
    checkpoint.write_history(run, saved["history"])  # the last row may be missing
    return saved["history"]


def save(trainer: Trainer, job: Job, history: list[dict]) -> None:
    """Save the epoch just finished; the weights only when its val mIoU is the best so far."""
    last = history[-1]
    if last["val_miou"] > max((row["val_miou"] for row in history[:-1]), default=-1.0):
        note = {"epoch": str(last["epoch"]), "val_miou": f"{last['val_miou']:.6f}"}
        checkpoint.save_weights(job.run / checkpoint.WEIGHTS, trainer.model.state_dict(), job.metadata | note)
    checkpoint.save_state(job.run / checkpoint.STATE, {"trainer": trainer.state(), "history": history})
    checkpoint.write_history(job.run, history)
