"""The three stages, wired: data, model, loss, augmentation, engine and tracking meet here and nowhere else."""

import contextlib
import hashlib
import json
import reprlib
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import augment, checkpoint, device, engine, losses, processes
from .classes import ClassSet
from .data import Batches, SegmentationSet, class_weights, instance_boxes, load_split
from .files import exclusive, write_json
from .inference import best_model, predictions, trained_model
from .metrics import scores, under_rule
from .model import UNet
from .session import Session
from .settings import STAGES, Settings, as_arguments, resolve
from .tracker import Tracker
from .trainer import LossFn, Trainer, TrainingStopped

# What may differ in a run that goes on: where data and weights lie (what they are may not), how many train, until when.
FREE = ("settings", "data", "init", "out", "project", "max_minutes", "num_processes")


PICTURES = 4  # val images that W&B shows over time
PICTURE_STEPS = 25  # at least, from one time to the next: they cost a fifth of a step


class OutOfTime(TrainingStopped):
    """settings.max_minutes were over before the first epoch was, so there are no weights yet; the state is saved."""


def load_sets(settings: Settings) -> tuple[SegmentationSet, SegmentationSet]:
    """The training set under the run's void rule, and the val set with void marked.

    Raises ValueError when the two were processed with different settings.
    """
    settings = resolve(settings)
    train_set, val_set = load_split(Path(settings.data), "train", settings.void), load_split(Path(settings.data), "val")
    kinds = [(dataset.class_set.name, dataset.size) for dataset in (train_set, val_set)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{settings.data}: expected train and val alike, found {kinds[0]}, {kinds[1]}; process both anew"
        )
    return train_set, val_set


def build_model(settings: Settings, class_set: ClassSet) -> nn.Module:
    """The U-Net of resolved settings, from random weights or from `init`, on the device to train on."""
    if settings.init is None:
        torch.manual_seed(settings.seed)
        model = UNet(len(class_set), settings.channels, settings.depth)
    else:
        model, metadata = trained_model(Path(settings.init))
        if metadata["class_set"] != class_set.name:
            raise ValueError(f"{settings.init}: expected class set {class_set.name}, found {metadata['class_set']}")
    return model.to(device.pick_device())


def loss_function(settings: Settings, train_set: SegmentationSet, where: torch.device) -> LossFn:
    """The stage's loss, with class weights from the training masks where it has them."""
    stage, weights = STAGES[settings.stage], None
    if stage.weighted:
        weights = torch.tensor(
            class_weights(train_set.num_pixels, settings.weighting), dtype=torch.float32, device=where
        )
    if stage.dice:
        return partial(losses.ce_dice, class_weights=weights, dice_share=settings.dice_share)
    return partial(losses.cross_entropy, class_weights=weights)


def augmentation(settings: Settings, train_set: SegmentationSet) -> Callable[..., tuple[Tensor, Tensor]]:
    """The stage's augmentation: (images, masks, rows, indices) -> (images, masks)."""
    if not STAGES[settings.stage].occlusion:
        return lambda images, masks, rows, indices: augment.basic(images, masks, rows)
    boxes, num_boxes = instance_boxes(train_set, settings.aim_at)

    def occlude_then_basic(images: Tensor, masks: Tensor, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        donors, _ = train_set.batch(augment.donors(rows, len(train_set)), images.device)
        aims = boxes[indices].to(images.device), num_boxes[indices].to(images.device)
        shares = settings.occlusion, settings.aimed, settings.occluded
        return augment.basic(*augment.occlude(images, masks, rows, *aims, donors, *shares), rows)

    return occlude_then_basic


def augmented(settings: Settings, train_set: SegmentationSet, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees: images (n, H, W, 3) uint8 and masks (n, H, W) uint8 of the first epoch."""
    batches = Batches(train_set, count, torch.device("cpu"), settings.seed, augmentation(settings, train_set))
    images, masks = next(batches.epoch(1))
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), masks.to(torch.uint8).numpy()


def train(
    settings: Settings, train_set: SegmentationSet, val_set: SegmentationSet, started: float | None = None
) -> list[dict]:
    """Train one stage, or go on with it where it was interrupted; returns its history, one dict per epoch.

    With settings.num_processes, or under torchrun, by several processes, each on a GPU of its own where there are any.
    train_set, val_set  from `load_sets`
    started             the time.monotonic() that settings.max_minutes count from (default: now); when they are over,
                        the history is shorter than settings.epochs, and the state is saved
    Raises ValueError when the run folder belongs to other settings or another process is at work in it,
    TrainingStopped when training cannot go on, OutOfTime before the first epoch.
    """
    started = time.monotonic() if started is None else started
    settings, session = resolve(settings), Session(settings.max_minutes, started)
    run, identity = Path(settings.out), identify(settings, train_set, val_set)
    if differing := differences(processes.from_first(lambda: identity), identity):
        raise ValueError("\n".join(["expected what the first process was given, found (there, here):", *differing]))
    config = processes.from_first(partial(claim, run, identity))
    if config and len(history := processes.from_first(partial(recorded, run))) >= settings.epochs:
        return history
    if settings.num_processes > 1 and processes.count() == 1:
        history = train_together(settings, started)
    else:
        history = train_here(settings, train_set, val_set, identity, config, session)
    if not history:
        raise OutOfTime(f"{run}: no epoch was finished in {settings.max_minutes} minutes; the same again goes on")
    return history


def train_here(
    settings: Settings,
    train_set: SegmentationSet,
    val_set: SegmentationSet,
    identity: dict,
    config: dict | None,
    session: Session,
) -> list[dict]:
    """Train in this process, alone or as one of several; config is None for a new run."""
    run = Path(settings.out)
    with exclusive(run) if processes.is_first() else contextlib.nullcontext():
        device.be_deterministic(settings.deterministic)
        model = build_model(settings, train_set.class_set)
        if config is not None:
            warn_of_moving(config, model)
        else:
            config = processes.from_first(partial(begin_run, identity, settings, train_set, val_set, model))
        return run_stage(settings, train_set, val_set, processes.synchronise(model), config, session)


def train_together(settings: Settings, started: float) -> list[dict]:
    """Train in settings.num_processes processes on this machine, started for it; returns the history."""
    if settings.max_minutes is not None:
        left = settings.max_minutes - (time.monotonic() - started) / 60
        settings = replace(settings, max_minutes=max(left, 0.01))
    status = processes.launch(settings.num_processes, ["train", *as_arguments(settings)])
    if status:
        raise TrainingStopped(f"{settings.out}: the training processes ended with exit status {status}; see above")
    return recorded(Path(settings.out))


def begin_run(
    identity: dict, settings: Settings, train_set: SegmentationSet, val_set: SegmentationSet, model: nn.Module
) -> dict:
    """Write and return the config of a new run."""
    config = identity | describe(settings, train_set, val_set, model)
    write_json(Path(settings.out) / checkpoint.CONFIG, config)
    return config


def run_stage(
    settings: Settings,
    train_set: SegmentationSet,
    val_set: SegmentationSet,
    model: nn.Module,
    config: dict,
    session: Session,
) -> list[dict]:
    """Wire a stage's batches, loss and W&B to the engine, and train."""
    run, where = Path(settings.out), next(model.parameters()).device
    train_batches = Batches(train_set, settings.batch_size, where, settings.seed, augmentation(settings, train_set))
    val_batches = Batches(val_set, settings.batch_size, where)
    num_steps = settings.epochs * len(train_batches)
    compiled = config["compile"] and (processes.count() == 1 or settings.compile == "yes")  # it was tried with one
    how = config["precision"], config["memory_format"], compiled
    trainer = Trainer(model, num_steps, settings.lr, settings.weight_decay, *how)
    job = engine.Job(run, settings.epochs, train_set.class_set.names, settings.void, config)
    keeper, loss_fn = engine.Keeper(trainer, job, session), loss_function(settings, train_set, where)
    tracker = Tracker(settings.project, run, config)
    every = max(1, settings.epochs // 10, -(-PICTURE_STEPS // len(train_batches)))
    log = partial(log_epoch, tracker=tracker, trainer=trainer, val_set=val_set, every=every)
    try:
        history = engine.fit(keeper, loss_fn, train_batches, val_batches, log)
        if len(history) == settings.epochs:
            log_best(run, val_set, settings.void, keeper.position.confusion, tracker)
    finally:
        tracker.finish()
    return history


def recorded(run: Path) -> list[dict]:
    """The history in a run's state, or, where somebody has deleted that, in history.csv.

    Raises ValueError when the best weights of these epochs are missing.
    """
    state = checkpoint.load_state(run)
    if state is None:
        return checkpoint.read_history(run)
    history = state["position"]["history"]
    if history and not (run / checkpoint.WEIGHTS).is_file():
        raise ValueError(f"{run}: expected the best weights so far, {checkpoint.WEIGHTS}, found none; begin a new run")
    if history:
        with contextlib.suppress(OSError):  # of a run that is attached read-only
            checkpoint.write_history(run, history)  # its last row may be missing
    return history


def log_epoch(record: dict, tracker: Tracker, trainer: Trainer, val_set: SegmentationSet, every: int) -> None:
    """Log an epoch and, of the first and every so many, what the network makes of the same few val images."""
    pictures = None
    if tracker.wanted and (record["epoch"] == 1 or record["epoch"] % every == 0):
        pictures = *predictions(trainer.model, val_set, PICTURES, trainer.precision), val_set.class_set.names
    tracker.epoch(record, pictures)


def log_best(run: Path, val_set: SegmentationSet, void: str, confusion: Tensor, tracker: Tracker) -> None:
    """Log the best weights, their scores and confusion matrix on val, and what they make of the same few images."""
    if tracker.wanted:
        model, metadata = best_model(run)
        names = val_set.class_set.names
        pictures = *predictions(model, val_set, PICTURES), names
        counts, score = under_rule(confusion.numpy(), void), scores(confusion.numpy(), names, void)
        tracker.best(pictures, counts, score, run / checkpoint.WEIGHTS, metadata)


def identify(settings: Settings, train_set: SegmentationSet, val_set: SegmentationSet) -> dict:
    """What makes a run this run and no other: settings, data, and the weights it starts from, by content."""
    return {
        "settings": json.loads(json.dumps(asdict(settings))),
        "class_set": train_set.class_set.name,
        "width": train_set.size[0],
        "height": train_set.size[1],
        "data_sha256": hashlib.sha256((train_set.sha256 + val_set.sha256).encode()).hexdigest(),
        "init_sha256": fingerprint(settings.init) if settings.init else None,
    }


def claim(run: Path, identity: dict) -> dict | None:
    """The config of the run folder if it was begun as the same run, None if it is new.

    Raises ValueError, showing the difference, when it was begun as another.
    """
    strangers = [name for name in (checkpoint.WEIGHTS, checkpoint.STATE) if (run / name).is_file()]
    if not (run / checkpoint.CONFIG).is_file():
        if strangers:
            raise ValueError(f"{run}: holds {' and '.join(strangers)} of an unknown run; choose another folder")
        return None
    config = checkpoint.read_config(run)
    if changed := differences(config, identity):
        begun = f"{run} was begun with other settings; choose another folder, or delete it and detach its source:"
        raise ValueError("\n".join([begun, *changed]))
    return config if strangers else None  # nothing was trained yet: begin anew


def differences(config: dict, identity: dict) -> list[str]:
    """What makes them two runs, a line each."""
    then, now = ({**facts, **facts["settings"]} for facts in (config, identity))
    return [
        f"  {key}: {reprlib.repr(then.get(key))} there, {reprlib.repr(now[key])} now"
        for key in now
        if key not in FREE and then.get(key) != now[key]
    ]


def warn_of_moving(config: dict, model: nn.Module) -> None:
    """Warn when a run goes on where its numbers may come out differently."""
    here = {"device": device.device_name(next(model.parameters()).device), "torch": str(torch.__version__)}
    moved = [f"{key} {config[key]} then, {value} now" for key, value in here.items() if config[key] != value]
    if moved:
        warnings.warn(f"going on elsewhere ({'; '.join(moved)}): the last digits may differ", stacklevel=3)


def describe(settings: Settings, train_set: SegmentationSet, val_set: SegmentationSet, model: nn.Module) -> dict:
    """What config.json holds besides the run's identity: facts about data, network and machine."""
    chosen, name = choose(settings, train_set, model), device.device_name(next(model.parameters()).device)
    tqdm.write(f"{Path(settings.out).name} on {name}: {chosen}", file=sys.stderr)
    return {
        **asdict(chosen),
        **{key: getattr(settings, key) for key in ("stage", "channels", "depth", "void", "seed")},
        "init_stage": checkpoint.load_weights(Path(settings.init))[1]["stage"] if settings.init else None,
        "train_images": len(train_set),
        "val_images": len(val_set),
        "train_note": train_set.split.note,
        "val_note": val_set.split.note,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "device": name,
        "torch": str(torch.__version__),
        "commit": commit(),
    }


def choose(settings: Settings, train_set: SegmentationSet, model: nn.Module) -> device.Choice:
    """How the network is to compute, as the settings ask or by measurement."""
    num_steps = settings.epochs * -(-len(train_set) // settings.batch_size)
    several = processes.count() > 1 and settings.compile == "auto"  # what one process measures alone says nothing
    asked = settings.precision, settings.memory_format, "no" if several else settings.compile
    return device.choose(model, train_set.size, num_steps, *asked)


def fingerprint(run_or_weights: str) -> str:
    """SHA-256 of the weights a run starts from."""
    return hashlib.sha256(checkpoint.weights_path(Path(run_or_weights)).read_bytes()).hexdigest()


def commit() -> str:
    """The commit of this code, marked "-dirty" when it was changed since, or "unknown" outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def forecast(settings: Settings, train_set: SegmentationSet, val_set: SegmentationSet) -> float:
    """Seconds that training will take here, from a few measured steps; an evaluated image counts a third."""
    model = build_model(settings, train_set.class_set)
    chosen = choose(replace(settings, compile="no"), train_set, model)
    return settings.epochs * (len(train_set) + len(val_set) / 3) * seconds_per_image(model, train_set.size, chosen)


def seconds_per_image(model: nn.Module, size: tuple[int, int], chosen: device.Choice) -> float:
    """Seconds of training per image: the median of twenty measured steps, which train the model."""
    trainer = Trainer(model, 100, 1e-4, 0.0, chosen.precision, chosen.memory_format)
    images = torch.rand(8, 3, *reversed(size), device=trainer.device)
    masks = torch.randint(0, 2, (8, *reversed(size)), device=trainer.device)
    model.train()
    seconds = []
    for _ in range(22):  # the first two are to warm up
        start = time.perf_counter()
        trainer.step(images, masks, losses.cross_entropy)[0].item()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]) / len(images)
