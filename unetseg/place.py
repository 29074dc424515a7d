"""Where a notebook finds itself: what is attached to it (on Kaggle, below /kaggle/input), and what is to be made."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from . import checkpoint
from .files import read_json
from .raw import choose_splits, find_layout
from .scenes import draw_dataset
from .settings import STAGES, Settings

KAGGLE = Path("/kaggle")
DEEPEST = 6  # folders below /kaggle/input that are looked into: datasets/<owner>/<slug>/<three more>
UNFINISHED = "processed.unfinished"  # the processed folder while preprocessing is at work
SCRIPT = Path(__file__).resolve().parents[1] / "preprocessing" / "image_segmentation_preprocessing.py"
DRAWN = {"train": 64, "val": 40}


def settle(settings: Settings) -> Settings:
    """The same settings with data that are there; says what was found, and makes what is missing.

    data="auto" becomes the folder `processed` beside the run folder, if there is one; else an attached processed
    folder; else what preprocessing makes, beside the run folder, of attached raw data or, with none, of drawn scenes.
    Attached runs, of an earlier session or another notebook, are copied beside the run folder, where there is none of
    that name, to go on with or to start from. A W&B key among Kaggle's secrets is put into the environment.
    """
    take_key()
    home = Path(settings.out).parent
    bring_runs(home)
    if settings.data == "auto":
        settings = replace(settings, data=str(find_data(home)))
    return settings


def take_key() -> None:
    """Put the secret WANDB_API_KEY of a Kaggle notebook into the environment, if it is attached."""
    if "WANDB_API_KEY" in os.environ or not KAGGLE.is_dir():
        return
    try:
        from kaggle_secrets import UserSecretsClient  # only there

        os.environ["WANDB_API_KEY"] = UserSecretsClient().get_secret("WANDB_API_KEY")
        print("W&B: the key comes from Kaggle's secrets")
    except Exception as error:  # kaggle_secrets names no common base; without a key runs are logged offline
        print(f"W&B: no secret WANDB_API_KEY ({type(error).__name__}), logging offline")


def attached() -> Iterator[Path]:
    """The folders below /kaggle/input, the upper ones first; none elsewhere."""
    level = [KAGGLE / "input"]
    for _ in range(DEEPEST):
        level = [path for folder in level if folder.is_dir() for path in _subfolders(folder)]
        yield from level


def _subfolders(folder: Path) -> list[Path]:
    """Those of a data set's inside are left out: there are thousands of files in them."""
    if folder.name in ("images_processed", "masks_processed", "leftImg8bit", "gtFine", "wandb"):
        return []
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def bring_runs(home: Path) -> None:
    """Copy attached runs into `home`: of each name that is not there, the one that has come furthest."""
    found: dict[str, list[Path]] = {}
    for folder in attached():
        if is_run(folder):
            found.setdefault(folder.name, []).append(folder)
    for name, runs in found.items():
        if not (home / name).exists():
            furthest = max(runs, key=lambda run: len(checkpoint.read_history(run)))
            unfinished = home / f".{name}.copying"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(furthest, unfinished, ignore=shutil.ignore_patterns("wandb", ".*"))
            for path in [unfinished, *unfinished.rglob("*")]:
                path.chmod(
                    path.stat().st_mode | 0o600 | (0o100 if path.is_dir() else 0)
                )  # what is attached is read-only
            unfinished.rename(home / name)
            print(f"{home / name}: {len(checkpoint.read_history(furthest))} epochs, copied from {furthest}")


def is_run(folder: Path) -> bool:
    """Whether the folder holds one of our runs, with weights or a state; other people's models have a config, too."""
    begun = any((folder / name).is_file() for name in (checkpoint.WEIGHTS, checkpoint.STATE))
    with contextlib.suppress(ValueError, OSError):
        return begun and read_json(folder / checkpoint.CONFIG).get("stage") in list(STAGES)
    return False


def find_data(home: Path) -> Path:
    """The processed folder of data="auto"."""
    processed = home / "processed"
    if (processed / "stats_train.json").is_file():
        print(f"data: {processed}, made before")
        return processed
    folders = list(attached())
    ready = [f for f in folders if (f / "stats_train.json").is_file() and (f / "images_processed").is_dir()]
    ready = [folder for folder in ready if folder.name != UNFINISHED]
    if ready:
        others = [*ready[1:], *filter(is_raw, folders)]
        others = f" (not taken: {', '.join(map(str, others))})" if others else ""
        print(f"data: {ready[0]}, attached{others}")
        return ready[0]
    raw, size = find_raw(folders, home), "256"
    if raw is None:
        raw, size = home / "scenes", "192x96"
        strange = [str(folder) for folder in folders if has_strange_pictures(folder)]
        found = f"nothing in a known layout, only pictures in {', '.join(strange[:3])}," if strange else "nothing"
        print(f"data: {found} is attached, so street scenes are drawn into {raw}")
        draw_dataset(raw, DRAWN)
    unfinished = home / UNFINISHED  # an interrupted session goes on with it, and no other finds it
    if processed.is_dir():  # somebody has begun it by hand
        unfinished = processed
    status = preprocess(raw, unfinished, size)
    splits = choose_splits(raw, find_layout(raw), None)
    if status and not all((unfinished / f"stats_{split}.json").is_file() for split in splits):
        raise ValueError(f"{raw}: expected data that can be preprocessed; see above")
    unfinished.rename(processed)
    print(f"data: {processed}, made from {raw}")
    return processed


def has_strange_pictures(folder: Path) -> bool:
    """Whether the folder holds pictures that are neither this repository's nor a run's."""
    code = any((above / "unetseg" / "stages.py").is_file() for above in (folder, *folder.parents))
    ours = folder.name == "pictures" or code
    return not ours and any(path.suffix in (".png", ".jpg") for path in folder.iterdir())


def is_raw(folder: Path) -> bool:
    """Whether the folder holds a raw data set."""
    try:
        return bool(find_layout(folder))
    except ValueError:
        return False


def find_raw(folders: list[Path], home: Path) -> Path | None:
    """The raw data set among the folders; Cityscapes' two archives, unpacked side by side, are linked into one.

    Raises ValueError when only one of the two is there.
    """
    if whole := next(filter(is_raw, folders), None):
        return whole
    parts = {name: next((f for f in folders if f.name == name), None) for name in ("leftImg8bit", "gtFine")}
    if not any(parts.values()):
        return None
    for name, folder in parts.items():
        if folder is None:
            there = next(filter(None, parts.values()))
            raise ValueError(f"{there}: expected {name} to go with it, found none; attach both archives of Cityscapes")
    (home / "raw").mkdir(parents=True, exist_ok=True)
    for name, folder in parts.items():
        if not (home / "raw" / name).exists():  # or it leads to where the data were attached before
            (home / "raw" / name).unlink(missing_ok=True)
            (home / "raw" / name).symlink_to(folder)
    return home / "raw"


def preprocess(raw: Path, processed: Path, size: str) -> int:
    """Run the preprocessing script; returns its exit status."""
    command = [sys.executable, SCRIPT, "--data_dir", raw, "--output_dir", processed, "--size", size]
    return subprocess.run([str(part) for part in command], check=False).returncode
