"""Every knob of a run, declared once, and the presets. Flags, checks and notebooks follow from this table."""

import argparse
import inspect
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from .files import UserError

RECIPE = {"loss": "ce", "weighting": "none", "occlusion": 0.0, "half_size": 0.0, "augment": ("occlude", "basic")}
RECIPE |= {"optimizer": "muon", "schedule": "one_cycle", "weight_decay": 0.01}
TUNING = RECIPE | {"epochs": 30, "lr": 1e-3, "occlusion": 0.5}
PUBLISHED = RECIPE | {"epochs": 100, "lr": 1e-4, "schedule": "constant", "weight_decay": 0.0, "augment": ()}
PUBLISHED |= {"model": "unet", "channels": 64, "depth": 3, "optimizer": "adamw"}
PRESETS = {  # a stage is a loss x an augmentation x a starting point; the two fine-tunings need `init`
    "scratch": RECIPE | {"epochs": 100, "lr": 3e-3, "half_size": 0.75},
    "weighted_ce": TUNING | {"weighting": "sqrt"},
    "ce_dice": TUNING | {"loss": "ce_dice"},
    "published": PUBLISHED,  # the recipe of the earlier published version
}
TITLES = {"scratch": "from scratch, CE", "weighted_ce": "weighted CE + occlusion", "ce_dice": "CE + Dice + occlusion"}
GROUPS = {"data": "data and folders", "epochs": "schedule", "model": "network", "void": "loss"}  # from a setting on
GROUPS |= {"augment": "augmentation", "precision": "machine and log"}
INHERITED = {"model": "context_unet", "channels": 32, "depth": 4, "void": "ignore"}  # from `init`, or these defaults
FREE = ("data", "out", "init", "epochs", "project", "max_minutes", "num_processes")  # may change when a run resumes


class SettingsError(UserError):
    """A setting that is invalid, or that another one rules out."""


def knob(default: object, text: str, *, choices: tuple | str = (), low: float = -math.inf, high: float = math.inf):
    """A setting: default (None: from the preset or `init`), help, names (or "module:REGISTRY") or range."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Every knob of a run; None takes the preset's value, or that of the weights in `init`."""

    stage: str = knob("scratch", "preset that the other settings override", choices=tuple(PRESETS))
    data: str = knob("processed", "processed folder; in the notebooks also auto")
    out: str = knob("runs/scratch", "run folder")
    init: str | None = knob(None, "run folder or weights file to start from")
    fold: int | None = knob(None, "quarter of train to hold out as val; training keeps 10 s away", low=0, high=3)
    epochs: int | None = knob(None, "passes over the training images", low=1, high=100_000)
    batch_size: int = knob(8, "images per step, over all processes", low=1, high=4096)
    half_size: float | None = knob(None, "first share of the epochs, at half the image size", low=0, high=1)
    lr: float | None = knob(None, "learning rate, the peak of one_cycle", low=1e-12, high=100)
    schedule: str | None = knob(None, "learning rate over time", choices=("one_cycle", "constant"))
    optimizer: str | None = knob(None, "optimiser", choices="optimizers:OPTIMIZERS")
    weight_decay: float | None = knob(None, "decoupled weight decay", low=0, high=10)
    seed: int = knob(0, "seed of weights, sample order and augmentation", low=0, high=2**32 - 1)
    model: str | None = knob(None, "network", choices="model:MODELS")
    channels: int | None = knob(None, "width of the first level", low=1, high=1024)
    depth: int | None = knob(None, "number of downsamplings", low=1, high=8)
    void: str | None = knob(None, "void pixels: ignore, or count as background", choices=("ignore", "background"))
    loss: str | None = knob(None, "loss function", choices="losses:LOSSES")
    weighting: str | None = knob(None, "class weights from pixel frequencies", choices="data:WEIGHTINGS")
    dice_share: float = knob(0.5, "share of Dice in ce_dice; the rest is cross-entropy", low=0, high=1)
    augment: tuple[str, ...] | None = knob(None, "augmentations, occlude first", choices="augment:AUGMENTATIONS")
    centred: float = knob(0.5, "share of images with an instance near their middle", low=0, high=1)
    colour: float = knob(0.3, "change of brightness, contrast and saturation, at most", low=0, high=1)
    occlusion: float | None = knob(None, "share of images with an occluder", low=0, high=1)
    aimed: float = knob(0.5, "share of occluders placed on an instance", low=0, high=1)
    occluder_size: float = knob(0.6, "longest side of the others, as a share of the image's", low=0.1, high=1)
    aim_at: tuple[str, ...] | None = knob(None, "classes of all those instances (default: people)")
    occluded: str = knob("keep", "covered pixels keep their class, or become void", choices=("keep", "void"))
    precision: str = knob("auto", "auto: by rule for the device", choices=("auto", "fp32", "fp16", "bf16"))
    compile: bool = knob(False, "use torch.compile")
    deterministic: bool = knob(False, "bitwise reproducible on a GPU too (a CPU always is), but slower")
    project: str | None = knob(None, "W&B project (default: WANDB_PROJECT, or unetseg)")
    max_minutes: float | None = knob(None, "save and stop before this time limit", low=1e-3, high=1e6)
    num_processes: int | None = knob(None, "processes here, one per GPU (1; in notebooks all GPUs)", low=1, high=64)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (Path, list)):  # lists come from JSON
                object.__setattr__(self, name, str(value) if isinstance(value, Path) else tuple(value))


KNOBS, HINTS = {f.name: f for f in fields(Settings)}, get_type_hints(Settings)


def kind(name: str) -> type:
    """The type of a setting, without None: str, int, float, bool or tuple."""
    hints = get_args(HINTS[name]) if isinstance(HINTS[name], UnionType) else (HINTS[name],)
    return get_origin(hints[0]) or hints[0]


def choices_of(name: str) -> tuple[str, ...]:
    """The names that a setting allows; empty where it allows any."""
    choices = KNOBS[name].metadata["choices"]
    return tuple(pkgutil.resolve_name(f"{__package__}.{choices}")) if isinstance(choices, str) else choices


def check(settings: Settings) -> Settings:
    """The same settings. Raises SettingsError, saying what to write instead, for the first one that is invalid."""
    for name, declared in KNOBS.items():
        value, type_, choices = getattr(settings, name), kind(name), choices_of(name)
        low, high = declared.metadata["low"], declared.metadata["high"]
        if type_ in (int, float):
            good = isinstance(value, type_ | int) and not isinstance(value, bool) and low <= value <= high
            expected = f"a {'whole ' * (type_ is int)}number from {low:g} to {high:g}"
        elif type_ is bool:
            good, expected = isinstance(value, bool), "True or False, without quotes"
        else:
            names = value if type_ is tuple else (value,)
            good = isinstance(names, tuple) and all(isinstance(n, str) and n in (choices or (n,)) for n in names)
            expected = "a list of names, such as" if type_ is tuple else "one of" if choices else "a text"
            expected += f" {', '.join(choices)}" if type_ is str else f" {list(choices) or ['person']}"
        if not (good or (value is None and NoneType in get_args(HINTS[name]))):
            raise SettingsError(f"{name}: expected {expected.strip()}; found {value!r}")
    return settings


def with_preset(settings: Settings) -> Settings:
    """Checked settings, with the preset's values where they are None. Raises SettingsError."""
    if check(settings).stage in ("weighted_ce", "ce_dice") and settings.init is None:
        raise SettingsError(f"{settings.stage} is a fine-tuning: name the run or weights it starts from with --init")
    return replace(settings, **{k: v for k, v in PRESETS[settings.stage].items() if getattr(settings, k) is None})


def complete(stored: dict) -> dict:
    """Stored settings without those that no longer exist, and with defaults for those that were not known then."""
    defaults = {name: declared.default for name, declared in KNOBS.items()}
    known = defaults | INHERITED | PRESETS[stored["stage"]] | {k: v for k, v in stored.items() if k in KNOBS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


def named_by(function: Callable, settings: dict) -> dict:
    """The settings whose names are parameters of `function`: how losses, augmentations and networks get their knobs."""
    return {name: settings[name] for name in inspect.signature(function).parameters if name in KNOBS}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per setting; a setting that is not given keeps its default."""
    parser.add_argument("stage", choices=tuple(PRESETS), help=KNOBS["stage"].metadata["help"])
    group = parser
    for name, declared in list(KNOBS.items())[1:]:
        group = parser.add_argument_group(GROUPS[name]) if name in GROUPS else group
        flag, text, choices = f"--{name.replace('_', '-')}", declared.metadata["help"], declared.metadata["choices"]
        if kind(name) is bool:
            group.add_argument(flag, action="store_true", default=None, help=text)
            continue
        default = INHERITED.get(name, declared.default)
        values = [default] if default is not None else [preset[name] for preset in PRESETS.values() if name in preset]
        default = ", ".join(dict.fromkeys(" ".join(v) or "nothing" if kind(name) is tuple else str(v) for v in values))
        text += f"; a name in {choices.replace(':', '.py, ')}" if isinstance(choices, str) else ""
        text += f" ({default})" if default else ""
        allowed = choices if choices and not isinstance(choices, str) else None
        options = {"nargs": "*"} if kind(name) is tuple else {"type": kind(name), "choices": allowed}
        group.add_argument(flag, **options, required=name in ("data", "out"), help=text)
