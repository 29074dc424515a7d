"""The training loop: `fit` is `train_one_epoch` and `evaluate`, epoch after epoch, and keeps the best.

Its state is saved at every epoch and every few minutes, so that a run that is killed goes on as if nothing had been.
"""

import math
import reprlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, processes
from .classes import IGNORE_INDEX
from .metrics import confusion_matrix, scores
from .session import Session
from .trainer import LossFn, Trainer, TrainingStopped, forward

SAVE_SECONDS = 180.0  # training that a killed process may lose
MAX_SKIPPED = 10  # steps in a row without a finite loss and gradient; fp16 needs some to find its loss scale
LOOK_STEPS = 10  # between two looks at the sums on a GPU, which has to wait for them
USUALLY_SKIPPED = 5  # steps of an epoch in fp16, which tries now and then how large the loss scale may be
COLLAPSED = 0.99  # share of all predictions that one class may have


class Pause(Exception):
    """Training ends here for now; the state is saved."""


@dataclass
class Evaluation:
    """What one pass over a split gives: mean loss per image, and the (C + 1, C) confusion matrix."""

    loss: float
    confusion: np.ndarray
    images_per_second: float


@dataclass(frozen=True)
class Job:
    """What `fit` needs to know besides the model, the loss and the batches."""

    run: Path
    num_epochs: int
    names: tuple[str, ...]  # of the classes
    void: str  # the rule that val loss and val mIoU are taken under
    config: dict  # what makes the run this run; checkpoint.METADATA of it goes with the best weights


@dataclass
class Position:
    """How far a run has come: the epochs done, and of the present one the steps, their seconds and sums.

    sums       (4,) float64: loss x images, images, and steps that were skipped, in this epoch and in a row
    confusion  (C + 1, C) of the best epoch so far on val
    """

    history: list[dict]
    step: int = 0
    seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    confusion: Tensor | None = None

    @property
    def epoch(self) -> int:
        return len(self.history) + 1

    def add(self, loss: Tensor, finite: Tensor, num_images: int) -> None:
        """Count a step, without making a GPU wait."""
        total, images, skipped, in_a_row = self.sums.unbind()
        new = total + loss.where(finite, 0) * num_images, images + finite * num_images
        self.sums = torch.stack([*new, skipped + ~finite, (in_a_row + 1) * ~finite])
        self.step += 1

    def next_epoch(self, row: dict) -> None:
        self.history.append(row)
        self.step, self.seconds, self.sums = 0, 0.0, self.sums * torch.tensor([0, 0, 0, 1], device=self.sums.device)


class Keeper:
    """Saves where a training stands: when that is due, and when the session is over. Of several, the first does."""

    def __init__(self, trainer: Trainer, job: Job, session: Session) -> None:
        self.trainer, self.job, self.session = trainer, job, session
        self.position = resume(trainer, job)
        self.saved, self.cost = time.monotonic(), 0.0

    def watch(self, batches: Iterable) -> Iterator:
        """The same batches; what was done with one is safe, or not yet due, before the next. Raises Pause."""
        for batch in batches:
            yield batch
            reason = self.session.over(reserve=self.cost)
            due = time.monotonic() - self.saved > max(SAVE_SECONDS, 50 * self.cost)
            decision = processes.highest(2 if reason else int(due and processes.is_first()))  # all do the same
            if decision:
                self.save()
            if decision == 2:
                raise Pause(reason or "another process ends")

    def save(self) -> None:
        start = time.monotonic()
        if processes.is_first():
            state = {"config": self.job.config, "trainer": self.trainer.state(), "position": vars(self.position)}
            checkpoint.save_state(self.job.run, state)
            if self.position.history:
                checkpoint.write_history(self.job.run, self.position.history)
        self.saved = time.monotonic()
        self.cost = self.saved - start

    def save_best(self, row: dict) -> None:
        if processes.is_first():
            weights = self.trainer.model.state_dict()
            checkpoint.save_weights(self.job.run, weights, self.job.config, row["epoch"], row["val_miou"])


def resume(trainer: Trainer, job: Job) -> Position:
    """Put the trainer where the run folder's state left it. Raises ValueError for the state of another run."""
    saved = processes.from_first(partial(checkpoint.load_state, job.run))
    if saved is None:
        return Position([], sums=torch.zeros(4, dtype=torch.float64, device=trainer.device))
    path = job.run / checkpoint.STATE
    changed = [key for key in job.config if saved["config"].get(key) != job.config[key]]
    if changed:
        pairs = {key: (reprlib.repr(saved["config"].get(key)), reprlib.repr(job.config[key])) for key in changed}
        there = ", ".join(f"{key}: {then} in it, {now} now" for key, (then, now) in pairs.items())
        raise ValueError(f"{path}: expected the state of this run, found {there}; was {checkpoint.CONFIG} edited?")
    try:
        trainer.load(saved["trainer"])
        position = Position(**saved["position"])
        position.sums = position.sums.to(trainer.device, torch.float64)
        steps = range(trainer.schedule["total_steps"] + 1)
        sound = type(position.step) is int and position.step in steps and math.isfinite(position.seconds)
        if position.sums.shape != (4,) or not sound:
            raise ValueError(f"step {reprlib.repr(position.step)}, {reprlib.repr(position.seconds)} seconds")
        num_classes, counts = len(job.names), position.confusion
        if position.history and (counts.shape != (num_classes + 1, num_classes) or counts.dtype != torch.int64):
            raise ValueError(f"a confusion matrix of shape {tuple(counts.shape)}, {counts.dtype}")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"{path}: expected the state of this run, found {reason}") from None
    return position


def fit(
    keeper: Keeper,
    loss_fn: LossFn,
    train_batches,
    val_batches,
    log: Callable[[dict], None] = lambda record: None,
) -> list[dict]:
    """Train to the job's last epoch from where the keeper's run folder stands; returns the history.

    train_batches, val_batches  with .dataset, .batch_size and .epoch(number, first step) -> iterable of (images, masks)
    log                         called after each epoch with its row of history and, under "scores", the val scores
    When the keeper's session is over before, the history returned is shorter, and the state saved.
    Raises TrainingStopped when losses or gradients stay not finite or memory does not suffice; what was saved stays.
    """
    job, session = keeper.job, keeper.session
    position, size = keeper.position, len(train_batches.dataset)
    done = len(position.history) * size + min(position.step * train_batches.batch_size, size)
    if keeper.trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bar = tqdm(desc=job.run.name, total=job.num_epochs * size, initial=done, unit="img", mininterval=1)
    with session, bar as progress:
        try:
            while position.epoch <= job.num_epochs:
                run_epoch(keeper, loss_fn, train_batches, val_batches, log, progress)
        except Pause as pause:
            place = f"in epoch {position.epoch} of {job.num_epochs}, after step {position.step} of {len(train_batches)}"
            if processes.is_first():
                said = f"{job.run.name}: stopped ({pause}) {place}; saved: the same again goes on from here"
                progress.write(said, sys.stderr)  # stdout is not shown where several processes were launched
    return position.history


def run_epoch(
    keeper: Keeper, loss_fn: LossFn, train_batches, val_batches, log: Callable[[dict], None], progress: tqdm
) -> None:
    """Train on every batch that is left, evaluate, log and save."""
    trainer, job, position = keeper.trainer, keeper.job, keeper.position
    batches = train_batches.epoch(position.epoch, position.step)
    train_loss, skipped = train_one_epoch(trainer, keeper.watch(batches), loss_fn, position, progress)
    start = time.perf_counter()
    batches = keeper.watch(val_batches.epoch())
    result = evaluate(trainer.model, batches, len(job.names), loss_fn, trainer.precision, job.void, trainer.part)
    score = scores(result.confusion, job.names, job.void)
    row = {"epoch": position.epoch, "train_loss": train_loss, "val_loss": result.loss, "val_miou": score["miou"] or 0.0}
    seconds = position.seconds + time.perf_counter() - start
    speed = len(train_batches.dataset) / max(position.seconds, 1e-9)
    row |= {"lr": trainer.lr, "seconds": seconds, "images_per_second": speed}
    usual = USUALLY_SKIPPED if trainer.precision == "fp16" else 0
    raise_concerns(row, skipped if skipped > usual else 0, result.confusion, job.names)
    best = max((earlier["val_miou"] for earlier in position.history), default=-1.0)
    if row["val_miou"] > best:
        keeper.save_best(row)
        position.confusion = torch.from_numpy(result.confusion)
    gpu = torch.cuda.max_memory_reserved() / 2**30 if trainer.device.type == "cuda" else None
    log(row | {"scores": score, "skipped_steps": skipped, "gpu_gibibytes": gpu})
    position.next_epoch(row)
    keeper.save()
    shown = {"epoch": row["epoch"], "mIoU": f"{row['val_miou']:.3f}", "best": f"{max(best, row['val_miou']):.3f}"}
    progress.set_postfix(shown)


def train_one_epoch(
    trainer: Trainer, batches: Iterable[tuple[Tensor, Tensor]], loss_fn: LossFn, position: Position, progress: tqdm
) -> tuple[float, int]:
    """Train on the batches, adding to the position; returns the epoch's mean loss per image and its skipped steps.

    Raises TrainingStopped after MAX_SKIPPED skipped steps in a row.
    """
    trainer.model.train()
    started = time.perf_counter() - position.seconds
    for images, masks in batches:
        loss, finite = trainer.step(images, masks, loss_fn)
        num_images = processes.total(len(images))
        position.add(loss, finite, num_images)
        position.seconds = time.perf_counter() - started
        progress.update(num_images)
        if images.device.type == "cpu" or position.step % LOOK_STEPS == 0:
            progress.set_postfix({"epoch": position.epoch, "loss": f"{look(position)[0]:.3f}"}, refresh=False)
    loss, skipped = look(position)
    position.seconds = time.perf_counter() - started
    return loss, skipped


def look(position: Position) -> tuple[float, int]:
    """The epoch's mean loss per image so far (NaN: no step counted) and its skipped steps. Raises TrainingStopped."""
    total, images, skipped, in_a_row = position.sums.tolist()
    if in_a_row >= MAX_SKIPPED:
        raise TrainingStopped(
            f"loss or gradient was not finite in {in_a_row:.0f} steps in a row, up to step {position.step} of epoch "
            f"{position.epoch}; what was saved before is intact; try a lower lr, in another run folder"
        )
    return total / images if images else math.nan, int(skipped)


def raise_concerns(row: dict, skipped: int, confusion: np.ndarray, names: tuple[str, ...]) -> None:
    """Warn of what an epoch should not have shown: skipped steps, a loss that is not finite, one class everywhere."""
    share = confusion.sum(axis=0) / max(confusion.sum(), 1)
    concerns = []
    if skipped:
        concerns.append(f"{skipped} steps were skipped because loss or gradient was not finite")
    if not math.isfinite(row["val_loss"]):
        concerns.append(f"the val loss is {row['val_loss']}")
    if share.max() > COLLAPSED:
        concerns.append(f"{share.max():.1%} of the val predictions are {names[share.argmax()]}: the network collapsed")
    for concern in concerns:
        warnings.warn(f"epoch {row['epoch']}: {concern}", stacklevel=2)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    loss_fn: LossFn,
    precision: str = "fp32",
    void: str = "ignore",
    part: int = sys.maxsize,
) -> Evaluation:
    """Score a model on batches whose masks mark void as IGNORE_INDEX; the counts do not depend on the batch size.

    void  the rule for the loss; the confusion matrix serves both
    part  images that go through the network at once
    """
    model.eval()
    device = next(model.parameters()).device
    confusion = torch.zeros(num_classes + 1, num_classes, dtype=torch.int64, device=device)
    total, num_images, start = torch.zeros((), device=device), 0, time.perf_counter()
    for images, masks in batches:
        logits, masks = processes.gather_batch(forward(model, images, precision, part), masks)
        truth = masks.where(masks != IGNORE_INDEX, 0) if void == "background" else masks
        total += loss_fn(logits, truth) * len(masks)
        confusion += confusion_matrix(logits.argmax(dim=1), masks, num_classes)
        num_images += len(masks)
    loss = total.item() / max(num_images, 1)
    return Evaluation(loss, confusion.cpu().numpy(), num_images / (time.perf_counter() - start))
