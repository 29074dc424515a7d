"""The training loop, read from top to bottom: `fit` alternates `train_one_epoch` and `evaluate`.

No epoch is chosen: a run's weights are the moving average at the end. What changes while training lies in one `State`,
saved as one file every few minutes and after each epoch that is not very short; from it a run resumes bit for bit.
"""

import contextlib
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from . import checkpoint, distributed
from .classes import IGNORE_INDEX
from .device import autocast, out_of_memory
from .files import UserError
from .losses import deep_supervision
from .metrics import METRICS, confusion_matrices, scores
from .optimizers import OPTIMIZERS

SAVE_SECONDS = 180.0  # of training that a kill may lose
SAVE_SHARE = 20  # times as long as a save takes: what may pass before an epoch is saved at its end
MAX_SKIPPED = 10  # steps in a row without a finite loss and gradient; fp16 needs some to find its loss scale
LOOK_STEPS = 10  # between two looks at the loss on a GPU, which has to wait for them
COLLAPSED = 0.99  # share of all predictions that one class may have
AVERAGED = 2  # epochs that the moving average of the weights looks back


class TrainingStopped(UserError):
    """Training cannot go on; the message says why."""


class Pause(Exception):
    """Training ends early, with its state saved."""


class Stopper:
    """Says when to stop early: SIGINT or SIGTERM has come, or the time limit is near."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.received, self.longest, self.looked = 0, 0.0, math.inf

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In this block a first signal is only noted, and delivered at the end; a second one acts at once."""
        main = threading.current_thread() is threading.main_thread()
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (None, signal.SIG_IGN)]

        def restore(number: int = 0, frame: object = None) -> None:
            self.received = self.received or number
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {number: signal.signal(number, restore) for number in numbers if main}
        try:
            yield
        finally:
            restore()
        if self.received:  # not after an error, such as a save that failed, which matters more
            signal.raise_signal(self.received)

    def reason(self, reserve: float = 0.0) -> str:
        """Why to stop now, or "". Ask at every step: twice the longest time between two calls is kept in reserve."""
        now = time.monotonic()
        self.longest, self.looked = max(self.longest, now - self.looked), now
        if self.received:
            return signal.Signals(self.received).name
        return "time limit reached" if now + 2 * self.longest + reserve > self.deadline else ""


class State:
    """Everything that changes while training, under one-cycle schedules (Smith, 2018).

    run, config    run folder, whose state is loaded, and its config.json; cycles there: last epoch of each schedule
    step, seconds  of the running epoch; `history` has a row per finished one
    sums           (4,) float64: loss x images, images, skipped steps in this epoch, and in a row
    average        exponential moving average of the weights, over about AVERAGED epochs
    confusion      (C + 1, C) of the last val pass, which scores the average
    """

    def __init__(self, model: nn.Module, run: Path, config: dict, steps_per_epoch: int, stopper: Stopper) -> None:
        self.run, self.config, self.steps_per_epoch, self.stopper = run, config, steps_per_epoch, stopper
        settings, self.device = config["settings"], next(model.parameters()).device
        self.precision, self.lr, self.void = settings["precision"], settings["lr"], settings["void"]
        self.model = model.to(memory_format=torch.channels_last)
        network = distributed.wrap(self.model)
        self.network = torch.compile(network, dynamic=False) if settings["compile"] else network
        make = OPTIMIZERS[settings["optimizer"]]
        self.optimizer = make(self.model.parameters(), lr=self.lr, weight_decay=settings["weight_decay"], fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.average = AveragedModel(self.model, use_buffers=True)
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]  # of BatchNorm
        self.statistics = parameters_to_vector(statistics or [torch.empty(0, device=self.device)])
        vector_to_parameters(self.statistics, statistics)  # they become views of the one vector
        self.saved, self.cost = time.monotonic(), 0.0
        zero = {"history": [], "step": 0, "seconds": 0.0, "confusion": None, "sums": torch.zeros(4).double()}
        saved = distributed.from_first(lambda: checkpoint.load_state(run, config)) or zero
        self.history, self.step, self.seconds, self.confusion, self.sums = (saved[key] for key in zero)
        self.sums = self.sums.to(self.device)
        if saved is not zero:
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": saved["moments"]})
            self.scaler.load_state_dict(saved["scaler"])
            if distributed.rank() == 0:
                self.write_results()  # a kill, or a user, may have left others

    @property
    def epoch(self) -> int:
        return len(self.history) + 1

    def save(self) -> None:
        """Write the state, then what follows from it. Of several processes, the first does."""
        start = time.monotonic()
        if distributed.rank() == 0:
            state = {key: getattr(self, key) for key in ("history", "step", "seconds", "confusion", "sums")}
            state |= {"model": self.model.state_dict(), "average": self.average.state_dict()}
            state |= {"moments": self.optimizer.state_dict()["state"]}
            checkpoint.save_state(self.run, state | {"scaler": self.scaler.state_dict()}, self.config)
            self.write_results()
        self.saved = time.monotonic()
        self.cost = self.saved - start

    def write_results(self) -> None:
        """Write the averaged weights and the history, which follow from the state."""
        miou = self.history[-1]["val_miou"] if self.history else None
        progress = {"epoch": len(self.history), "step": self.step, "val_miou": miou}
        checkpoint.save_weights(self.run, self.average.module.state_dict(), progress, self.config)
        checkpoint.write_history(self.run, self.history)

    def watch(self, batches: Iterable) -> Iterator:
        """The same batches; between two of them, save when that is due, and stop by raising Pause."""
        for batch in batches:
            yield batch
            reason = self.stopper.reason(reserve=self.cost)
            due = time.monotonic() - self.saved > max(SAVE_SECONDS, 50 * self.cost)
            votes = distributed.all_sum(1000 * bool(reason) + due)  # all processes do the same
            if votes:
                self.save()
            if votes >= 1000:
                raise Pause(reason or "another process stops")

    def schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate from the present step on; a second cycle covers epochs that were asked for later."""
        if self.config["settings"]["schedule"] == "constant":
            return torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        ends = [0, *self.config["cycles"]]
        first = max(end for end in ends if end < self.epoch)
        total = self.steps_per_epoch * (min(end for end in ends if end > first) - first)
        done = self.steps_per_epoch * (self.epoch - 1 - first) + self.step
        shape = {"max_lr": self.lr, "total_steps": max(total, 6), "pct_start": 0.2, "cycle_momentum": False}
        torch.optim.lr_scheduler.OneCycleLR(self.optimizer, **shape)  # sets what a later start needs
        return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, **shape, last_epoch=done - 1)

    def train_loss(self) -> float:
        """Mean loss per image in the running epoch. Raises TrainingStopped after MAX_SKIPPED skipped steps in a row."""
        total, images, _, in_a_row = self.sums.tolist()
        if in_a_row >= MAX_SKIPPED:
            where = f"{in_a_row:.0f} steps in a row, up to step {self.step} of epoch {self.epoch}"
            raise TrainingStopped(f"loss or gradient was not finite in {where}; use a lower lr, in another run folder")
        return total / images if images else math.nan

    def update_average(self) -> None:
        """Move the average towards the weights of this step; at first it is their plain mean."""
        steps = (self.epoch - 1) * self.steps_per_epoch + self.step
        share = max(1 / (steps + 1), 1 / (AVERAGED * self.steps_per_epoch))
        self.average.multi_avg_fn = get_ema_multi_avg_fn(1 - share)
        self.average.update_parameters(self.model)

    def end_epoch(self, row: dict, confusion: np.ndarray) -> None:
        """Append a row to the history. Raises TrainingStopped when loss or weights are not finite any more."""
        weights = self.average.module.state_dict().values()
        if not (math.isfinite(row["val_loss"]) and all(value.isfinite().all() for value in weights)):
            raise TrainingStopped(f"{self.run}: training diverged in epoch {self.epoch}; use a lower lr, another --out")
        self.history.append(row)
        self.step, self.seconds, self.confusion = 0, 0.0, torch.from_numpy(confusion)
        self.sums = self.sums * torch.tensor([0, 0, 0, 1], device=self.device)


def fit(
    state: State, loss_fn: Callable, train_batches, val_batches, log: Callable, show: Callable | None = None
) -> list[dict]:
    """Train from where the state stands to the last epoch of its config; returns the history.

    train_batches, val_batches  with .epoch(number, first batch) -> iterable of (images, masks, indices)
    log                         called with each epoch's row of the history
    show                        called with the history after each epoch, in place of a progress bar
    When the stopper ends it early, the history is shorter and the state is saved. Raises TrainingStopped.
    """
    num_epochs, size, batch_size = state.config["cycles"][-1], len(train_batches.dataset), train_batches.batch_size
    done = len(state.history) * size + min(state.step * batch_size, size)
    hidden = {"disable": True} if show else {}  # else TQDM_DISABLE decides
    bar = tqdm(desc=state.run.name, total=num_epochs * size, initial=done, unit="img", mininterval=1, **hidden)
    with state.stopper.listening(), bar:
        try:
            while state.epoch <= num_epochs:
                train_one_epoch(state, state.watch(train_batches.epoch(state.epoch, state.step)), loss_fn, bar)
                names, val = state.config["classes"], state.watch(val_batches.epoch())
                result = evaluate(state.average.module, val, len(names), loss_fn, state.precision, state.void)
                row = history_row(state, result)
                state.end_epoch(row, result.confusion)
                log(row)
                if state.epoch > num_epochs or time.monotonic() - state.saved > SAVE_SHARE * state.cost:
                    state.save()
                if show:
                    show(state.history)
        except Pause as pause:
            place = f"in epoch {state.epoch} of {num_epochs}, after step {state.step} of {state.steps_per_epoch}"
            if distributed.rank() == 0:
                place += ". State saved: run the same command to resume."
                bar.write(f"{state.run.name}: {pause}, stopped {place}", sys.stderr)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            advice = f"try --batch-size {batch_size // 2}" if batch_size > 1 else "use fewer channels or smaller images"
            raise TrainingStopped(f"out of memory with batch size {batch_size}: {advice} ({str(error)[:99]})") from None
    return state.history


def train_one_epoch(state: State, batches: Iterable, loss_fn: Callable, bar: tqdm) -> None:
    """Train on the batches. A step whose loss or gradient is not finite changes nothing but the schedule."""
    state.model.train()
    schedule, started = state.schedule(), time.perf_counter() - state.seconds
    for images, masks, _ in batches:
        statistics = state.statistics.clone()
        loss, main = deep_supervision(loss_fn, forward(state.network, images, state.precision), masks)
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        finite = loss.isfinite() & norm.isfinite()
        state.optimizer.found_inf = (~finite).float()  # the fused optimiser looks at it, without making a GPU wait
        state.optimizer.step()
        state.scaler.update()
        schedule.step()
        state.optimizer.zero_grad(set_to_none=True)
        distributed.average_(state.statistics, len(images))
        state.statistics.copy_(torch.where(finite, state.statistics, statistics))
        num_images = distributed.all_sum(len(images))
        total, seen, skipped, in_a_row = state.sums.unbind()
        sums = total + main.where(finite, 0) * num_images, seen + finite * num_images, skipped + ~finite
        state.sums = torch.stack([*sums, (in_a_row + 1) * ~finite])
        state.update_average()
        state.step, state.seconds = state.step + 1, time.perf_counter() - started
        bar.update(num_images)
        if state.device.type == "cpu" or state.step % LOOK_STEPS == 0:
            bar.set_postfix({"epoch": state.epoch, "loss": f"{state.train_loss():.3f}"}, refresh=False)


def forward(network: nn.Module, images: Tensor, precision: str) -> Tensor | list[Tensor]:
    """Logits (N, C, H, W) float32 of images (N, 3, H, W), computed in "fp32", "fp16" or "bf16"; of some networks, while
    they train, a list that goes on with coarser ones."""
    with autocast(images.device, precision if len(images) else "fp32"):  # SyncBatchNorm has no dtype for no images
        outputs = network(images)
    return outputs.float() if isinstance(outputs, Tensor) else [logits.float() for logits in outputs]


class Evaluation(NamedTuple):
    """One pass over a split: mean loss per image, and the confusion matrix of each image, (N, C + 1, C) int64."""

    loss: float
    confusions: np.ndarray
    seconds: float

    @property
    def confusion(self) -> np.ndarray:
        """(C + 1, C) totals."""
        return self.confusions.sum(axis=0)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable, num_classes: int, loss_fn: Callable, precision="fp32", void="ignore", look=None
) -> Evaluation:
    """Score a model on batches of (images, masks, indices) whose masks mark void.

    void  the rule for the loss; the confusion matrices serve both rules, and do not depend on the batch size
    look  called with the logits and masks of each batch
    """
    model.eval()
    found, rows, total, num_images, start = [], [], 0.0, 0, time.perf_counter()
    for images, masks, indices in batches:
        logits = forward(model, images, precision)
        truth = masks.where(masks != IGNORE_INDEX, 0) if void == "background" else masks
        count = distributed.all_sum(len(masks))
        total, num_images = total + loss_fn(logits, truth) * count, num_images + count
        found.append(confusion_matrices(logits.argmax(dim=1), masks, num_classes))
        if look:
            look(logits, masks)
        rows.append(indices)
    confusions = torch.zeros(num_images, num_classes + 1, num_classes, dtype=torch.int64)
    confusions[torch.cat(rows)] = torch.cat(found).cpu()
    confusions = distributed.all_sum(confusions).numpy()
    return Evaluation(float(total) / num_images, confusions, time.perf_counter() - start)


def history_row(state: State, result: Evaluation) -> dict:
    """An epoch's row of the history; warns of what should not be in it."""
    names, (_, images, skipped, _) = state.config["classes"], state.sums.tolist()
    score, share = scores(result.confusion, names, state.void), result.confusion.sum(axis=0) / result.confusion.sum()
    row = {"epoch": state.epoch, "train_loss": state.train_loss(), "val_loss": result.loss}
    row |= {"val_miou": score["miou"] or 0.0, "lr": state.optimizer.param_groups[0]["lr"]}
    row |= {"seconds": state.seconds + result.seconds, "images_per_second": images / max(state.seconds, 1e-9)}
    row |= {"skipped_steps": int(skipped), "cycle": 1 + sum(end < state.epoch for end in state.config["cycles"])}
    row["gpu_gibibytes"] = torch.cuda.max_memory_reserved() / 2**30 if state.device.type == "cuda" else None
    row |= {f"val_{name}": score[name] for name in METRICS if name != "miou"}
    row |= {f"val_iou_{name}": values["iou"] for name, values in score["classes"].items()}
    usual = 5 if state.precision == "fp16" else 0  # it now and then tries a larger loss scale
    for concern, found in (
        (f"{skipped:.0f} steps were skipped because loss or gradient was not finite", skipped > usual),
        (f"{share.max():.1%} of the predictions are {names[share.argmax()]}: it collapsed", share.max() > COLLAPSED),
    ):
        if found:
            warnings.warn(f"epoch {state.epoch}: {concern}", stacklevel=2)
    return row
