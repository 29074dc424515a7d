"""What a notebook finds attached to it (on Kaggle, below /kaggle/input), and making what is missing."""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from .. import checkpoint
from ..files import UserError
from ..processed import find_split
from ..settings import PRESETS, Settings
from . import preprocess
from .layouts import ANY_PICTURE, Tree, describe, find_data_sets
from .scenes import draw_dataset

KAGGLE = Path("/kaggle")
DRAWN = {"train": 64, "val": 40}  # scenes
QUICK_CHANNELS, QUICK_IMAGES = 16, {"scratch": 2000, "weighted_ce": 800, "ce_dice": 800}  # images that a stage sees
LEAST_IMAGES, MOST_EPOCHS = {"scratch": 90_000}, 300  # that a stage sees of a small data set, in up to so many epochs
SESSION_MINUTES, BEGUN = 690, time.monotonic()  # of the twelve hours that Kaggle gives; the import, as a session begins


def prepare(settings: Settings) -> Settings:
    """The same settings with data that are there, and a schedule, a number of processes and a time limit that suit them
    where the settings have None; prints what was found, and makes what is missing.

    data="auto" becomes the folder `processed` beside the run folder; else an attached processed folder; else one made
    from attached raw data or, where no pictures are attached, from drawn scenes. The folder of a raw data set becomes
    the processed folder made from it. Attached runs (of an earlier session or another notebook) are copied beside the
    run folder. A W&B key among Kaggle's secrets goes into the environment.
    """
    take_key()
    home = Path(settings.out).parent
    bring_runs(home)
    if settings.init is not None:
        checkpoint.read_about(Path(settings.init))  # says what is missing before any work
    raw = Path(settings.data).is_dir() and not list(Path(settings.data).glob("stats_*.json"))
    if settings.data == "auto" or raw:
        settings = replace(settings, data=str(find_data(home, Path(settings.data) if raw else None)))
    suggested = suggestions(settings)
    return replace(settings, **{name: value for name, value in suggested.items() if getattr(settings, name) is None})


def suggestions(settings: Settings) -> dict:
    """Every GPU; on Kaggle what is left of a session; more epochs for a small data set; on drawn scenes a quick
    schedule and a small network."""
    found: dict = {"num_processes": max(1, torch.cuda.device_count())}
    if KAGGLE.is_dir():
        found["max_minutes"] = max(1.0, SESSION_MINUTES - (time.monotonic() - BEGUN) / 60)
    stems = list(find_split(Path(settings.data), "train").checked)
    found["epochs"] = full_epochs(settings.stage, len(stems))
    if all(stem.startswith("drawn_") for stem in stems):
        print("drawn scenes: the quick schedule, where epochs and channels are None")
        found["epochs"] = quick_epochs(settings.stage, len(stems))
        found |= {"channels": QUICK_CHANNELS} if settings.init is None else {}
    return found


def full_epochs(stage: str, num_images: int) -> int:
    """The preset's epochs or, where so few images make few steps, more of them."""
    return max(PRESETS[stage]["epochs"], min(MOST_EPOCHS, LEAST_IMAGES.get(stage, 0) // num_images))


def quick_epochs(stage: str, num_images: int) -> int:
    return max(2, min(60, QUICK_IMAGES.get(stage, 2000) // num_images))


def take_key() -> None:
    """Put the secret WANDB_API_KEY of a Kaggle notebook into the environment, if it is attached."""
    if "WANDB_API_KEY" in os.environ or not KAGGLE.is_dir():
        return
    try:
        from kaggle_secrets import UserSecretsClient  # exists only there

        os.environ["WANDB_API_KEY"] = UserSecretsClient().get_secret("WANDB_API_KEY")
        print("W&B: the key comes from Kaggle's secrets")
    except Exception as error:  # kaggle_secrets has no common base class; without a key runs are logged offline
        print(f"W&B: no secret WANDB_API_KEY ({type(error).__name__}), logging offline")


def bring_runs(home: Path) -> None:
    """Copy attached runs into `home`: of each name that is not there, the one with the most epochs."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for folder, (_, files) in Tree(KAGGLE / "input").items():
        if {checkpoint.WEIGHTS, checkpoint.STATE} & {*files}:
            with suppress(UserError):  # somebody else's model
                checkpoint.read_config(folder)
                found.setdefault(folder.name, []).append((len(checkpoint.read_history(folder)), folder))
    for name, runs in found.items():
        if not (home / name).exists():
            epochs, run = max(runs, key=lambda found: found[0])
            unfinished = home / f".{name}.copying"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("wandb", ".*"))
            for path in [unfinished, *unfinished.rglob("*")]:  # what is attached is read-only
                path.chmod(path.stat().st_mode | (0o700 if path.is_dir() else 0o600))
            unfinished.rename(home / name)
            print(f"{home / name}: {epochs} epochs, copied from {run}")


def find_data(home: Path, raw: Path | None = None) -> Path:
    """The processed folder of data="auto", or of a raw data set."""
    processed = home / "processed"
    if (processed / "stats_train.json").is_file() and raw is None:
        print(f"data: {processed}, made before")
        return processed
    found, tree = find_data_sets(raw or KAGGLE / "input")
    ready = [folder for folder, (_, files) in tree.items() if "stats_train.json" in files]
    if ready and raw is None:
        others = ", ".join(map(str, [*ready[1:], *(data_set.root for data_set in found)]))
        print(f"data: {ready[0]}, attached" + (f" (not used: {others})" if others else ""))
        return ready[0]
    names = [name for folder, (_, files) in tree.items() if folder.name != "pictures" for name in files]
    if not found and (raw or any(ANY_PICTURE.search(name) or name.lower().endswith(".zip") for name in names)):
        raise UserError(describe(tree))
    if not found:
        print(f"data: no pictures are attached, so street scenes are drawn into {home / 'scenes'}")
        draw_dataset(home / "scenes", DRAWN)
        found = find_data_sets(home / "scenes")[0]
    root, size = found[0].root, "x".join(map(str, found[0].quick_size())) if found[0].root == home / "scenes" else "256"
    if len(found) > 1:
        others = ", ".join(f"{data_set.root} ({data_set.layout.name})" for data_set in found[1:])
        print(f'data: {root} ({found[0].layout.name}); to take another, write its folder as data="…": {others}')
    command = ["--data_dir", str(root), "--output_dir", str(processed), "--size", size]
    if preprocess.main(command, found[0]) and not (processed / "stats_train.json").is_file():
        raise UserError(f"{root}: expected data that can be preprocessed; see above")
    print(f"data: {processed}, made from {root}")
    return processed
