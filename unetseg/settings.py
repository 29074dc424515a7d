"""Every knob of a run, declared once, and the three presets. Flags, checks and notebooks follow from this table."""

import argparse
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from .files import UserError

PRESETS = {  # a stage is a loss x an augmentation x a starting point; the two fine-tunings need `init`
    "scratch": {"epochs": 100, "lr": 3e-3, "loss": "ce", "weighting": "none", "occlusion": 0.0},
    "weighted_ce": {"epochs": 30, "lr": 1e-3, "loss": "ce", "weighting": "sqrt", "occlusion": 0.5},
    "ce_dice": {"epochs": 30, "lr": 1e-3, "loss": "ce_dice", "weighting": "sqrt", "occlusion": 0.5},
}
TITLES = {"scratch": "from scratch, CE", "weighted_ce": "weighted CE + occlusion", "ce_dice": "CE + Dice + occlusion"}
INHERITED = {"model": "unet", "channels": 32, "depth": 4, "void": "ignore"}  # from `init`, or these defaults


class SettingsError(UserError):
    """A setting that is invalid, or that another one rules out."""


def knob(default: object, text: str, *, choices: tuple | str = (), low: float = -math.inf, high: float = math.inf):
    """A setting: default (None: from the preset or from `init`), help, allowed names or range; the type is its hint.

    choices  names, or the registry that holds them as "module.REGISTRY"
    """
    return field(default=default, metadata={"help": text, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Every knob of a run; None takes the preset's value, or that of the weights in `init`."""

    stage: str = knob("scratch", "preset that the other settings override", choices=tuple(PRESETS))
    data: str = knob("processed", "processed folder; in the notebooks also auto")
    out: str = knob("runs/scratch", "run folder")
    init: str | None = knob(None, "run folder or weights file to start from")
    epochs: int | None = knob(None, "passes over the training images", low=1, high=100_000)
    batch_size: int = knob(8, "images per step, over all processes", low=1, high=4096)
    lr: float | None = knob(None, "peak learning rate of the one-cycle schedule", low=1e-12, high=100)
    weight_decay: float = knob(0.01, "weight decay of AdamW", low=0, high=10)
    model: str | None = knob(None, "network", choices="model.MODELS")
    channels: int | None = knob(None, "width of the first level", low=1, high=1024)
    depth: int | None = knob(None, "number of downsamplings", low=1, high=8)
    seed: int = knob(0, "seed of weights, sample order and augmentation", low=0, high=2**32 - 1)
    void: str | None = knob(None, "void pixels: ignore, or count as background", choices=("ignore", "background"))
    loss: str | None = knob(None, "loss function", choices="losses.LOSSES")
    weighting: str | None = knob(None, "class weights from frequencies: none, sqrt, inverse, median, enet", choices="data.WEIGHTINGS")
    dice_share: float = knob(0.5, "share of Dice in ce_dice; the rest is cross-entropy", low=0, high=1)
    augment: tuple[str, ...] = knob(("occlude", "basic"), "augmentations, in order", choices="augment.AUGMENTATIONS")
    occlusion: float | None = knob(None, "share of images with an occluder", low=0, high=1)
    aimed: float = knob(0.5, "share of occluders placed on an instance", low=0, high=1)
    aim_at: tuple[str, ...] | None = knob(None, "classes of those instances (default: people)")
    occluded: str = knob("keep", "covered pixels keep their class, or become void", choices=("keep", "void"))
    precision: str = knob("auto", "fp32, fp16 or bf16; auto: by rule for the device", choices=("auto", "fp32", "fp16", "bf16"))
    memory_format: str = knob("channels_last", "memory format of the tensors", choices=("channels_last", "contiguous"))
    compile: bool = knob(False, "use torch.compile")
    deterministic: bool = knob(False, "bitwise reproducible on a GPU, and slower (a CPU always is)")
    project: str | None = knob(None, "W&B project (default: WANDB_PROJECT, or unetseg)")
    max_minutes: float | None = knob(None, "save and stop before this time limit", low=1e-3, high=1e6)
    num_processes: int = knob(1, "processes on this machine, one per GPU", low=1, high=64)

    def __post_init__(self) -> None:
        for name in ("data", "out", "init"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("augment", "aim_at"):  # JSON has lists only
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))


KNOBS = {f.name: f for f in fields(Settings)}
HINTS = get_type_hints(Settings)
FREE = ("data", "out", "init", "epochs", "project", "max_minutes", "num_processes")  # may change when a run resumes


def kind(name: str) -> type:
    """The type of a setting, without None: str, int, float, bool or tuple."""
    hints = get_args(HINTS[name]) if isinstance(HINTS[name], UnionType) else (HINTS[name],)
    return get_origin(hints[0]) or hints[0]


def choices_of(name: str) -> tuple[str, ...]:
    """The names that a setting allows; empty where it allows any."""
    choices = KNOBS[name].metadata["choices"]
    if isinstance(choices, str):
        module, registry = choices.split(".")
        choices = tuple(getattr(importlib.import_module(f".{module}", __package__), registry))
    return choices


def check(settings: Settings) -> Settings:
    """The same settings. Raises SettingsError, saying what to write instead, for the first one that is invalid."""
    for name in KNOBS:
        value = getattr(settings, name)
        if problem := _problem(name, value):
            raise SettingsError(f"{name}: expected {problem}, found {value!r}")
    return settings


def _problem(name: str, value: object) -> str:
    """What a setting should be, or "" when the value is allowed."""
    type_, meta, choices = kind(name), KNOBS[name].metadata, choices_of(name)
    if value is None and NoneType in get_args(HINTS[name]):
        return ""
    if type_ in (int, float):
        number = isinstance(value, (int,) if type_ is int else (int, float)) and not isinstance(value, bool)
        if number and meta["low"] <= value <= meta["high"]:
            return ""
        return f"a {'whole ' if type_ is int else ''}number from {meta['low']:g} to {meta['high']:g}"
    if type_ is tuple:
        good = isinstance(value, tuple) and all(isinstance(v, str) and (not choices or v in choices) for v in value)
        return "" if good else f'a list of names such as ["{choices[0] if choices else "person"}"]' + _one_of(choices)
    if type_ is bool:
        return "" if isinstance(value, bool) else "True or False (without quotes)"
    return "" if isinstance(value, str) and (not choices or value in choices) else f"text{_one_of(choices)}"


def _one_of(choices: tuple[str, ...]) -> str:
    return f" (one of {', '.join(choices)})" if choices else ""


def with_preset(settings: Settings) -> Settings:
    """Checked settings, with the preset's values where they are None. Raises SettingsError."""
    check(settings)
    if settings.stage != "scratch" and settings.init is None:
        raise SettingsError(f"{settings.stage} is a fine-tuning: name the run or weights it starts from with --init")
    preset = PRESETS[settings.stage].items()
    return replace(settings, **{name: value for name, value in preset if getattr(settings, name) is None})


def complete(stored: dict) -> dict:
    """Stored settings without those that no longer exist, and with defaults for those that their version did not know."""
    defaults = {name: declared.default for name, declared in KNOBS.items()}
    known = defaults | INHERITED | PRESETS[stored["stage"]] | {k: v for k, v in stored.items() if k in KNOBS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


def named_by(function: Callable, settings: Settings) -> dict:
    """The settings whose names are parameters of `function`: how losses, augmentations and networks get their knobs."""
    return {name: getattr(settings, name) for name in inspect.signature(function).parameters if name in KNOBS}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per setting; a setting that is not given keeps its default."""
    parser.add_argument("stage", choices=tuple(PRESETS), help=KNOBS["stage"].metadata["help"])
    for name, declared in list(KNOBS.items())[1:]:
        flag, text = f"--{name.replace('_', '-')}", declared.metadata["help"]
        if kind(name) is bool:
            parser.add_argument(flag, action="store_true", default=None, help=text)
            continue
        values = [str(preset[name]) for preset in PRESETS.values() if name in preset]
        default = ", ".join(values) or INHERITED.get(name, declared.default)
        choices = declared.metadata["choices"] if isinstance(declared.metadata["choices"], tuple) else ()
        more = {"nargs": "*"} if kind(name) is tuple else {"type": kind(name), "choices": choices or None}
        required = name in ("data", "out")
        shown = "" if required or default is None else f" ({' '.join(default) if kind(name) is tuple else default})"
        parser.add_argument(flag, **more, default=None, required=required, help=text + shown.replace("%", "%%"))
