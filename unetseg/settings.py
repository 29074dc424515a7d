"""What the three stages are, and every knob of a run."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from . import checkpoint
from .classes import VOID_RULES
from .data import WEIGHTINGS
from .device import DTYPES, FORMATS
from .model import MOST


@dataclass(frozen=True)
class Stage:
    """What sets a stage apart from the others."""

    title: str
    epochs: int  # the full schedule
    lr: float  # the peak of the one-cycle schedule
    weighted: bool  # class-weighted cross-entropy
    dice: bool
    occlusion: bool


STAGES = {
    #                   title              epochs  peak lr  weighted  Dice   occlusion
    "scratch": Stage("from scratch, CE", 100, 3e-3, False, False, False),
    "weighted_ce": Stage("weighted CE + occlusion", 30, 1e-3, True, False, True),
    "ce_dice": Stage("CE + Dice + occlusion", 30, 1e-3, True, True, True),
}


CHOICES = {
    "stage": tuple(STAGES),
    "void": VOID_RULES,
    "precision": ("auto", *DTYPES),
    "memory_format": ("auto", *FORMATS),
    "compile": ("auto", "yes", "no"),
    "weighting": WEIGHTINGS,
    "occluded": ("keep", "void"),
}


@dataclass(frozen=True)
class Settings:
    """Every knob of a run. None means: the stage's own value, or that of the weights it starts from."""

    stage: str  # "scratch", "weighted_ce" or "ce_dice"
    data: str  # the processed folder
    out: str  # the run folder
    init: str | None = None  # run folder or weights to start from; the two fine-tunings need it
    epochs: int | None = None  # passes over the training images
    batch_size: int = 8  # images per step, of all processes together
    lr: float | None = None  # peak learning rate
    weight_decay: float = 0.01
    channels: int | None = None  # width of the first level (32)
    depth: int | None = None  # number of downsamplings (4)
    seed: int = 0
    void: str | None = None  # "ignore" (default) or "background"
    precision: str = "auto"  # "fp32", "fp16", "bf16", or measured
    memory_format: str = "auto"  # of the convolutions: "channels_last", "contiguous", or measured
    compile: str = "auto"  # by torch.compile: "yes", "no", or on GPUs where the run is long enough to repay it
    weighting: str = "sqrt"  # class weights from frequencies: "sqrt", "inverse", "median", "enet", "none"
    dice_share: float = 0.5  # of the loss in ce_dice; the rest is cross-entropy
    occlusion: float = 0.5  # share of the images that get an occluder
    aimed: float = 0.5  # share of the occluders that are placed on an instance
    aim_at: tuple[str, ...] | None = None  # the classes of those instances (people)
    occluded: str = "keep"  # covered pixels "keep" their class or become "void"
    project: str = "unetseg"  # the W&B project
    max_minutes: float | None = None  # stop, saved, when so many minutes have passed; the same again goes on
    num_processes: int = 1  # that train together, each on a GPU of its own where there are any; 2 on Kaggle's T4 x2
    deterministic: bool = False  # on a GPU: the same bits in every run, for some speed; a CPU always does so


class SettingsError(ValueError):
    """A setting that cannot be, or that another one rules out."""


def resolve(settings: Settings) -> Settings:
    """Fill in every None. Raises SettingsError for settings that cannot be."""
    if settings.stage not in STAGES:
        raise SettingsError(f"stage {settings.stage!r}: expected one of {', '.join(STAGES)}")
    stage, known = STAGES[settings.stage], {"channels": 32, "depth": 4, "void": "ignore"}
    if settings.stage != "scratch" and settings.init is None:
        raise SettingsError(f"{settings.stage} is a fine-tuning: give the run or weights it starts from (--init RUN)")
    if settings.init is not None:
        metadata = checkpoint.load_weights(Path(settings.init))[1]
        known = {"channels": int(metadata["channels"]), "depth": int(metadata["depth"]), "void": metadata["void"]}
        for name in ("channels", "depth"):
            if getattr(settings, name) not in (None, known[name]):
                raise SettingsError(f"{settings.init}: expected {name} {getattr(settings, name)}, found {known[name]}")
    known |= {"epochs": stage.epochs, "lr": stage.lr}
    settings = replace(settings, **{key: value for key, value in known.items() if getattr(settings, key) is None})
    for name in ("epochs", "batch_size", "lr", "max_minutes", "num_processes"):
        if not (getattr(settings, name) is None or 0 < getattr(settings, name) < math.inf):  # also true of NaN
            raise SettingsError(f"{name}: expected more than 0, found {getattr(settings, name)}")
    for name in ("weight_decay", "seed"):
        if not 0 <= getattr(settings, name) < 2**32:
            raise SettingsError(f"{name}: expected 0 or more, below 2**32, found {getattr(settings, name)}")
    for name, most in MOST.items():
        if not 0 < getattr(settings, name) <= most:
            raise SettingsError(f"{name}: expected 1 to {most}, found {getattr(settings, name)}")
    for name in ("dice_share", "occlusion", "aimed"):
        if not 0 <= getattr(settings, name) <= 1:
            raise SettingsError(f"{name}: expected a share in [0, 1], found {getattr(settings, name)}")
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            raise SettingsError(f"{name}: expected one of {', '.join(choices)}; found {getattr(settings, name)!r}")
    return settings


def as_arguments(settings: Settings) -> list[str]:
    """The arguments of `python -m unetseg train` that give these settings."""
    arguments = [settings.stage]
    for name, value in vars(settings).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif isinstance(value, (tuple, list)):
            arguments += [flag, *value]
        elif value is not None and value is not False and name != "stage":
            arguments.append(f"{flag}={value}")
    return arguments
