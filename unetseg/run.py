"""One run: settings -> data, model, loss and augmentation, trained, in a run folder whose config.json stays true."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from . import checkpoint, commit, distributed
from .checkpoint import CONFIG, STATE, WEIGHTS
from .classes import stored
from .data import Batches, SegmentationSet, class_weights, load_split
from .device import be_deterministic, device_name, pick_device, precision_rule
from .files import UserError, exclusive, make_folder, write_json
from .losses import LOSSES
from .model import build_model
from .processed import find_split, read_stats, training_splits
from .settings import INHERITED, Settings, SettingsError, named_by, with_preset
from .tracking import Tracker, is_waiting
from .train import State, Stopper, TrainingStopped, fit

Sets = tuple[SegmentationSet, SegmentationSet]


def train(
    settings: Settings, log: Callable | None = None, sets: Sets | None = None, show: Callable | None = None
) -> list[dict]:
    """Train a run, or resume it where it was interrupted; returns its history, which a time limit may cut short.

    log   called with each new row of the history, in place of W&B
    show  called with the history after each epoch, in place of a progress bar
    sets  training and val set from `load_sets`, where they are in memory already
    Raises UserError when the run folder is another run's or in use, TrainingStopped when training cannot go on.
    """
    stopper = Stopper(settings.max_minutes)
    distributed.begin()
    settings = resolve(settings)
    run, config = Path(settings.out), open_run(settings, sets)
    history, done = checkpoint.read_history(run), (run / WEIGHTS).is_file() and (log or not is_waiting(run))
    if done and len(history) == config["cycles"][-1]:
        return history
    if settings.num_processes > 1 and not distributed.launched():
        return launch(settings, config, log, show)
    with exclusive(run) if distributed.rank() == 0 else contextlib.nullcontext():
        distributed.from_first(partial(write_json, run / CONFIG, config))
        be_deterministic(settings.deterministic)
        (train_set, val_set), device = sets or load_sets(settings), pick_device()
        if distributed.rank() == 0:
            tqdm.write(f"{run.name} on {device_name(device)}: {config['settings']['precision']}", sys.stderr)
        model = initial_model(settings, config).to(device)
        half_epochs = round(settings.half_size * config["cycles"][0])
        train_batches = Batches(train_set, settings.batch_size, device, settings, half_epochs)
        val_batches = Batches(val_set, settings.batch_size, device)
        loss_fn = loss_function(settings, train_set, device)
        state = State(model, run, config, len(train_batches), stopper)
        silent = log or distributed.rank() > 0
        with contextlib.nullcontext() if silent else Tracker(run, config, val_set, state) as tracker:
            write = log or (tracker.log if tracker else lambda row: None)
            return fit(state, loss_fn, train_batches, val_batches, write, show)


def resolve(settings: Settings) -> Settings:
    """The settings with every None filled in: from the preset, from `init`, or by default. Raises SettingsError."""
    settings, known = with_preset(settings), INHERITED | {"num_processes": 1}
    if settings.init is not None:
        about = checkpoint.read_about(Path(settings.init))
        known |= {name: about[name] for name in INHERITED}
        for name in ("model", "channels", "depth"):
            if (found := getattr(settings, name)) not in (None, known[name]):
                raise SettingsError(f"{name}: expected {known[name]} as in {settings.init}, found {found}")
    return replace(settings, **{name: value for name, value in known.items() if getattr(settings, name) is None})


def load_sets(settings: Settings) -> Sets:
    """The training set under the run's void rule, and the val set with void marked."""
    data, (train, val) = Path(settings.data), training_splits(settings.fold)
    return load_split(data, train, resolve(settings).void), load_split(data, val)


def open_run(settings: Settings, sets: Sets | None = None) -> dict:
    """The config of the run folder: new, or the stored one with what may change in a resumed run. Raises UserError."""
    data, init = Path(settings.data), settings.init
    splits = [s.split for s in sets] if sets else [find_split(data, name) for name in training_splits(settings.fold)]
    splits = dict(zip(("train", "val"), splits))
    stats, other = (read_stats(data, split.folder) for split in splits.values())
    if any(stats.get(key) != other.get(key) for key in ("class_set", "sources", "size")):
        raise UserError(f"{data}: train and val have different class sets, ids or sizes; preprocess both again, alike")
    facts = stored(stats).facts() | dict(zip(("width", "height"), stats["size"]))
    facts["init_sha256"] = checkpoint.weights_sha256(Path(init)) if init else None
    about = checkpoint.read_about(Path(init)) if init else {}
    facts["starts"] = [*(about.get("starts") or []), about["train_sha256"]] if init else []  # trained on these data
    facts["data"] = {n: {"sha256": s.sha256, "note": s.note, "images": s.images} for n, s in splits.items()}
    config = distributed.from_first(partial(merge_config, settings, facts))
    if config["data"] != facts["data"]:
        raise UserError(f"{data}: this process was given other data than the first process")
    return config


def merge_config(settings: Settings, facts: dict) -> dict:
    """The facts of a run with those of its folder. Raises UserError when they are those of another run."""
    run, device = Path(settings.out), pick_device()
    begun = [name for name in (WEIGHTS, STATE) if (run / name).is_file()]
    if begun and not (run / CONFIG).is_file():
        raise UserError(f"{run}: holds {' and '.join(begun)} of an unknown run; use another --out")
    old = checkpoint.read_config(run) if begun else {}  # nothing was trained: the folder is begun anew
    chosen = old["settings"]["precision"] if old else precision_rule(device)
    settings = replace(settings, precision=chosen if settings.precision == "auto" else settings.precision)
    session = {"device": device_name(device), "torch": str(torch.__version__), "commit": commit()}
    config = {"format": checkpoint.FORMAT, "settings": asdict(settings), **facts}
    if not old:
        refuse_unfinished(settings.init)
        return config | {"cycles": [settings.epochs], "sessions": [session]}
    if old["init_sha256"] != facts["init_sha256"] and old["settings"]["init"] == settings.init:
        warnings.warn(f"{settings.init} has changed since this run began, which goes on from its own", stacklevel=2)
        config["init_sha256"] = old["init_sha256"]
    changed = checkpoint.differences(checkpoint.identity(old), checkpoint.identity(config))
    cycles, done = old["cycles"], len(checkpoint.read_history(run))
    if settings.epochs > cycles[-1] and done == cycles[-1]:
        cycles = [*cycles, settings.epochs]  # more epochs for a finished run: a second one-cycle
    elif settings.epochs != cycles[-1]:
        changed.append(f"  epochs: {cycles[-1]} there, {settings.epochs} here (a finished run can be given more)")
    if changed:
        said = f"{run} belongs to a run with other settings; use another --out, or delete the folder. Different:"
        raise UserError("\n".join([said, *changed]))
    if STATE not in begun and done < cycles[-1]:
        raise UserError(f"{run}: {STATE} is gone, so this run cannot resume; start another one with --init {run}")
    sessions = old["sessions"] + [session] * (session != old["sessions"][-1])
    return config | {"cycles": cycles, "sessions": sessions}


def refuse_unfinished(init: str | None) -> None:
    """Raise UserError when a run starts from the folder of an unfinished one; its weights file can be named instead."""
    if init and Path(init).is_dir() and (progress := checkpoint.unfinished(checkpoint.read_about(Path(init)))):
        advice = f"finish it, or start from its present weights by --init {Path(init) / WEIGHTS}"
        raise UserError(f"{init}: expected a finished run, found {progress}; {advice}")


def initial_model(settings: Settings, config: dict) -> nn.Module:
    """The network with random weights, or with those of `init`; says what is unusual about them."""
    if settings.init is None:
        torch.manual_seed(settings.seed)
        return build_model(asdict(settings), len(config["classes"]))
    model, about = checkpoint.load_model(Path(settings.init))
    if about["classes"] != config["classes"]:
        raise UserError(f"{settings.init}: expected the classes {config['classes']}, found {about['classes']}")
    if about["void"] != settings.void:
        warnings.warn(f"{settings.init} was trained under void={about['void']}, not {settings.void}", stacklevel=2)
    if progress := checkpoint.unfinished(about):
        warnings.warn(f"{settings.init} has {progress}; its present weights are used", stacklevel=2)
    return model


def loss_function(settings: Settings, train_set: SegmentationSet, device: torch.device) -> Callable:
    """The loss as a function of logits and mask, with class weights from the training masks."""
    function, weights = LOSSES[settings.loss], None
    if settings.weighting != "none":
        weights = torch.from_numpy(class_weights(train_set.num_pixels, settings.weighting)).float().to(device)
    return partial(function, class_weights=weights, all_sum=distributed.all_sum, **named_by(function, vars(settings)))


def summary(history: list[dict]) -> str:
    """The last epoch, in words."""
    if not history:
        return "no epoch is finished yet; run the same again to resume"
    return f"val mIoU {history[-1]['val_miou']:.4f} after {len(history)} epochs"


def launch(settings: Settings, config: dict, log: Callable | None, show: Callable | None) -> list[dict]:
    """Train in settings.num_processes processes, by torchrun as a child on config.json; returns the history."""
    run, number = Path(settings.out), settings.num_processes
    write_json(make_folder(run) / CONFIG, config)
    paths = filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number))} | os.environ
    environment |= {"PYTHONPATH": os.pathsep.join(paths)} | ({"WANDB_MODE": "disabled"} if log else {})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    command, seen = [*torchrun, "-m", "unetseg", "resume", str(run)], len(checkpoint.read_history(run))
    options = {"stdout": subprocess.DEVNULL, "start_new_session": True, "preexec_fn": end_with_parent}
    child = subprocess.Popen(command, env=environment | ({"TQDM_DISABLE": "1"} if show else {}), **options)
    try:
        while child.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
            history = checkpoint.read_history(run)  # a last time when it has ended
            new, seen = history[seen:], len(history)
            for row in new if log else ():
                log(row)
            if show and new:
                show(history)
    except KeyboardInterrupt:  # which has not reached torchrun, in a session of its own
        child.send_signal(signal.SIGINT)  # once: it passes it on, and waits thirty seconds for the save
        child.wait()
        raise
    finally:
        child.terminate()  # nothing where it has ended
        child.wait()
    if child.returncode:
        raise TrainingStopped(f"{run}: the training processes ended with exit status {child.returncode}; see above")
    return checkpoint.read_history(run)


def end_with_parent() -> None:
    """Let the kernel send SIGTERM when the parent dies, which may be killed as a notebook's is; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
