"""One run: settings -> data, model, loss and augmentation, trained; and a run folder whose config.json is true."""

import contextlib
import copy
import os
import signal
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
from torch import nn
from tqdm import tqdm

from . import checkpoint, distributed
from .checkpoint import CONFIG, STATE, WEIGHTS
from .classes import CLASS_SETS
from .data import Batches, SegmentationSet, class_weights, load_split
from .device import be_deterministic, device_name, pick_device, precision_rule
from .files import UserError, exclusive, make_folder, write_json
from .losses import LOSSES
from .model import build_model
from .processed import find_split, read_stats
from .settings import INHERITED, Settings, SettingsError, complete, named_by, with_preset
from .tracking import Tracker, wandb_is_waiting
from .train import State, Stopper, TrainingStopped, fit

Sets = tuple[SegmentationSet, SegmentationSet]


def train(settings: Settings, log: Callable[[dict], None] | None = None, sets: Sets | None = None) -> list[dict]:
    """Train a run, or resume it where it was interrupted; returns its history, one dict per epoch.

    With settings.num_processes > 1, or under torchrun, several processes train, each on a GPU of its own.
    log   called with each new row of the history, in place of W&B
    sets  training and val set from `load_sets`, where they are in memory already
    When the time limit is reached, the history is shorter than settings.epochs and the state is saved.
    Raises UserError when the run folder belongs to another run or is in use, TrainingStopped when training cannot go on.
    """
    stopper = Stopper(settings.max_minutes)
    distributed.begin()
    settings = resolve(settings)
    run, config = Path(settings.out), open_run(settings, sets)
    history = checkpoint.read_history(run)
    if len(history) == config["cycles"][-1] and (run / WEIGHTS).is_file() and (log or not wandb_is_waiting(run)):
        return history
    if settings.num_processes > 1 and not distributed.launched():
        return launch(settings, config, log)
    with exclusive(run) if distributed.rank() == 0 else contextlib.nullcontext():
        distributed.from_first(partial(write_json, run / CONFIG, config))
        be_deterministic(settings.deterministic)
        train_set, val_set = sets or load_sets(settings)
        device = pick_device()
        where = f"{run.name} on {device_name(device)}: {config['settings']['precision']}, {settings.memory_format}"
        tqdm.write(where, sys.stderr)
        model = initial_model(settings, config).to(device)
        check_smallest_batch(settings, model, train_set)
        train_batches = Batches(train_set, settings.batch_size, device, settings)
        val_batches = Batches(val_set, settings.batch_size, device)
        state = State(model, run, config, len(train_batches), stopper)
        loss_fn = loss_function(settings, train_set, device)
        if log or distributed.rank() > 0:
            return fit(state, loss_fn, train_batches, val_batches, log or (lambda row: None))
        with Tracker(run, config, val_set, state) as tracker:
            return fit(state, loss_fn, train_batches, val_batches, tracker.log)


def resolve(settings: Settings) -> Settings:
    """The settings with no None left that matters: from the preset, from the weights in `init`, or by default.

    Raises SettingsError for settings that are invalid or contradict `init`.
    """
    settings, known = with_preset(settings), INHERITED
    if settings.init is not None:
        about = checkpoint.load_weights(Path(settings.init))[1]
        known = {name: about[name] for name in INHERITED}
        for name in ("model", "channels", "depth"):
            if getattr(settings, name) not in (None, known[name]):
                raise SettingsError(f"{name}: expected {known[name]}, as in {settings.init}, found {getattr(settings, name)}")
    return replace(settings, **{name: value for name, value in known.items() if getattr(settings, name) is None})


def load_sets(settings: Settings) -> Sets:
    """The training set under the run's void rule, and the val set with void marked."""
    data, void = Path(settings.data), resolve(settings).void
    return load_split(data, "train", void), load_split(data, "val")


def open_run(settings: Settings, sets: Sets | None = None) -> dict:
    """The config of the run folder: a new one, or the stored one with what may change when a run resumes.

    Raises UserError, showing the difference, when the folder belongs to another run.
    """
    facts = describe(settings, sets)
    config = distributed.from_first(partial(_open, settings, facts))
    if changed := checkpoint.differences(config, {key: facts[key] for key in ("data", "init_sha256")}):
        raise UserError("\n".join(["this process was given other files than the first process (there, here):", *changed]))
    return config


def _open(settings: Settings, facts: dict) -> dict:
    run = Path(settings.out)
    begun = [name for name in (WEIGHTS, STATE) if (run / name).is_file()]
    if begun and not (run / CONFIG).is_file():
        raise UserError(f"{run}: holds {' and '.join(begun)} of an unknown run; use another --out")
    old = checkpoint.read_config(run) if begun else {}  # nothing was trained: the folder is begun anew
    chosen = old["settings"]["precision"] if old else precision_rule(pick_device())
    precision = chosen if settings.precision == "auto" else settings.precision
    config = {"format": checkpoint.FORMAT, "settings": asdict(replace(settings, precision=precision)), **facts}
    config |= {"cycles": [settings.epochs], "sessions": [here()]}
    if not old:
        return config
    if old["init_sha256"] != facts["init_sha256"] and old["settings"]["init"] == settings.init:
        warnings.warn(f"{settings.init} has other weights than when this run began; it resumes from its own", stacklevel=2)
        config["init_sha256"] = old["init_sha256"]
    changed = checkpoint.differences(checkpoint.identity(old), checkpoint.identity(config))
    cycles, done = old["cycles"], len(checkpoint.read_history(run))
    if settings.epochs > cycles[-1] and done == cycles[-1]:
        cycles = [*cycles, settings.epochs]  # more epochs for a finished run: a second one-cycle
    elif settings.epochs != cycles[-1]:
        changed.append(f"  epochs: {cycles[-1]} there, {settings.epochs} here (a finished run can be given more)")
    if changed:
        advice = "use another --out, or delete the folder. Different:"
        raise UserError("\n".join([f"{run} belongs to a run with other settings; {advice}", *changed]))
    if STATE not in begun and done < cycles[-1]:
        raise UserError(f"{run}: {STATE} is gone, so this run cannot resume; start another one with --init {run}")
    sessions = old["sessions"] + [here()] * (here() != old["sessions"][-1])
    return config | {"cycles": cycles, "sessions": sessions}


def describe(settings: Settings, sets: Sets | None = None) -> dict:
    """The facts of config.json that come from files: the data and the weights that the run starts from."""
    data = Path(settings.data)
    splits = [s.split for s in sets] if sets else [find_split(data, name) for name in ("train", "val")]
    (stats, other) = (read_stats(data, split.folder) for split in splits)
    if differing := [key for key in ("class_set", "size") if stats[key] != other[key]]:
        found = ", ".join(f"{key} {stats[key]} and {other[key]}" for key in differing)
        raise UserError(f"{data}: expected train and val processed alike, found {found}; process both again")
    facts = {"class_set": stats["class_set"], "classes": list(CLASS_SETS[stats["class_set"]].names)}
    facts |= dict(zip(("width", "height"), stats["size"]))
    facts["data"] = {
        name: {"sha256": split.sha256, "note": split.note, "images": split.images}
        for name, split in zip(("train", "val"), splits)
    }
    return facts | {"init_sha256": checkpoint.weights_sha256(Path(settings.init)) if settings.init else None}


def here() -> dict:
    """Where and with what code this session computes."""
    return {"device": device_name(pick_device()), "torch": str(torch.__version__), "commit": commit()}


def commit() -> str:
    """The commit of this code, marked "-dirty" when it was changed since; "unknown" outside a clone of its repository."""
    folder = Path(__file__).parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5, env=environment).stdout

    try:
        git("ls-files", "--error-unmatch", "run.py")  # or the folder lies, installed, in somebody else's repository
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12").strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def initial_model(settings: Settings, config: dict) -> nn.Module:
    """The network with random weights, or with those of `init`; says what is unusual about them."""
    if settings.init is None:
        torch.manual_seed(settings.seed)
        return build_model(asdict(settings), len(config["classes"]))
    model, about = checkpoint.load_model(Path(settings.init))
    if about["classes"] != config["classes"]:
        raise UserError(f"{settings.init}: expected the classes {config['classes']}, found {about['classes']}")
    for remark in remarks(settings, about):
        tqdm.write(f"warning: {remark}", sys.stderr)
    return model


def remarks(settings: Settings, about: dict) -> list[str]:
    """What a reader should know about the weights that a run starts from."""
    init, said = Path(settings.init), []
    if init.is_dir() and about["format"] == checkpoint.FORMAT:
        done, planned = len(checkpoint.read_history(init)), checkpoint.read_config(init)["cycles"][-1]
        said += [f"{init} is not finished: {done} of {planned} epochs; its best weights so far are used"] * (done < planned)
    if about["void"] != settings.void:
        said.append(f'{init} was trained with void="{about["void"]}", this run uses "{settings.void}"')
    return said


def check_smallest_batch(settings: Settings, model: nn.Module, train_set: SegmentationSet) -> None:
    """Raise SettingsError when batch normalisation would get a single value per channel, in an epoch's last batch."""
    last = len(train_set) % settings.batch_size or settings.batch_size
    smallest = max(1, min(settings.batch_size, last) // distributed.world())
    width, height = train_set.size
    try:
        copy.deepcopy(model).to("meta").train()(torch.empty(smallest, 3, height, width, device="meta"))
    except ValueError as error:
        raise SettingsError(
            f"batch_size: {settings.batch_size} leaves {smallest} image(s) of {width}x{height} in a batch, too few for "
            f"depth {settings.depth}: {error}; use another batch size or a smaller depth"
        ) from None


def loss_function(settings: Settings, train_set: SegmentationSet, device: torch.device) -> Callable:
    """The loss with its settings, and with class weights from the training masks."""
    function, weights = LOSSES[settings.loss], None
    if settings.weighting != "none":
        found = class_weights(train_set.num_pixels, settings.weighting)
        weights = torch.tensor(found, dtype=torch.float32, device=device)
    knobs = named_by(function, settings)
    return partial(function, class_weights=weights, all_sum=distributed.all_sum, **knobs)


def augmented(settings: Settings, train_set: SegmentationSet, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees: images (n, H, W, 3) uint8 and masks (n, H, W) uint8 of the first epoch."""
    images, masks, _ = next(Batches(train_set, count, torch.device("cpu"), settings).epoch(1))
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), masks.to(torch.uint8).numpy()


def summary(history: list[dict]) -> str:
    """The best epoch, in words."""
    best = max(history, key=lambda row: row["val_miou"], default=None)
    if best is None:
        return "no epoch is finished yet; run the same again to resume"
    return f"best val mIoU {best['val_miou']:.4f} at epoch {best['epoch']:.0f} of {len(history)}"


def launch(settings: Settings, config: dict, log: Callable[[dict], None] | None) -> list[dict]:
    """Train in settings.num_processes processes, by torchrun as a child on the run's config.json; returns the history."""
    run = make_folder(Path(settings.out))
    write_json(run / CONFIG, config)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.num_processes}"]
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"WANDB_MODE": "disabled"} if log else {}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // settings.num_processes)))
    command = [sys.executable, *torchrun, "-m", "unetseg", "resume", str(run)]
    seen = len(checkpoint.read_history(run))
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while (ended := child.poll()) is None or len(checkpoint.read_history(run)) > seen:
            for row in checkpoint.read_history(run)[seen:]:
                (log or (lambda row: None))(row)
                seen += 1
            time.sleep(0.2 if ended is None else 0)
    except KeyboardInterrupt:  # which has not reached torchrun, in a session of its own
        child.send_signal(signal.SIGINT)  # once: it passes it on, and waits thirty seconds for the save
        child.wait()
        raise
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if child.returncode:
        raise TrainingStopped(f"{run}: the training processes ended with exit status {child.returncode}; see above")
    return checkpoint.read_history(run)
