"""What a notebook finds attached to it (on Kaggle, below /kaggle/input), and making what is missing."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .. import checkpoint
from ..files import UserError
from ..settings import Settings
from . import preprocess
from .layouts import LAYOUTS, find_layout
from .scenes import draw_dataset

KAGGLE = Path("/kaggle")
DEEPEST = 6  # folders below /kaggle/input that are looked into: datasets/<owner>/<slug>/<three more>
INSIDE = ("images_processed", "masks_processed", "visualizations", "leftImg8bit", "gtFine", "wandb")
INSIDE += (preprocess.UNFINISHED,)
DRAWN = {"train": 64, "val": 40}  # scenes


def prepare(settings: Settings) -> Settings:
    """The same settings with data that are there; prints what was found, and makes what is missing.

    data="auto" becomes the folder `processed` beside the run folder; else an attached processed folder; else one made
    from attached raw data or, where no pictures are attached, from drawn scenes. Attached runs (of an earlier session
    or another notebook) are copied beside the run folder. A W&B key among Kaggle's secrets goes into the environment.
    """
    take_key()
    home = Path(settings.out).parent
    bring_runs(home)
    return replace(settings, data=str(find_data(home))) if settings.data == "auto" else settings


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


def attached() -> Iterator[Path]:
    """The folders below /kaggle/input, the upper ones first; none elsewhere."""
    level = [KAGGLE / "input"]
    for _ in range(DEEPEST):
        level = [path for folder in level if folder.name not in INSIDE for path in sorted(folder.glob("*/"))]
        yield from level


def bring_runs(home: Path) -> None:
    """Copy attached runs into `home`: of each name that is not there, the one with the most epochs."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for folder in attached():
        if (folder / checkpoint.WEIGHTS).is_file() or (folder / checkpoint.STATE).is_file():
            try:
                checkpoint.read_config(folder)
                found.setdefault(folder.name, []).append((len(checkpoint.read_history(folder)), folder))
            except UserError:
                continue  # somebody else's model
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


def find_data(home: Path) -> Path:
    """The processed folder of data="auto"."""
    processed, folders = home / "processed", list(attached())
    if (processed / "stats_train.json").is_file():
        print(f"data: {processed}, made before")
        return processed
    ready = [f for f in folders if (f / "stats_train.json").is_file() and f.name != preprocess.UNFINISHED]
    if ready:
        others = [*ready[1:], *filter(is_raw, folders)]
        others = f" (not used: {', '.join(map(str, others))})" if others else ""
        print(f"data: {ready[0]}, attached{others}")
        return ready[0]
    raw, size = find_raw(folders, home), "256"
    if raw is None:
        raw, size = home / "scenes", LAYOUTS[0].quick_size
        print(f"data: no pictures are attached, so street scenes are drawn into {raw}")
        draw_dataset(raw, DRAWN)
    status = preprocess.main(["--data_dir", str(raw), "--output_dir", str(processed), "--size", size])
    if status and not (processed / "stats_train.json").is_file():
        raise UserError(f"{raw}: expected data that can be preprocessed; see above")
    print(f"data: {processed}, made from {raw}")
    return processed


def is_raw(folder: Path) -> bool:
    """Whether the folder holds a raw data set."""
    return any(layout.matches(folder) for layout in LAYOUTS)


def find_raw(folders: list[Path], home: Path) -> Path | None:
    """The raw data set among the folders; Cityscapes' two archives, unpacked side by side, are linked into one. Raises
    UserError for one archive without the other, and for pictures in a layout that is not known."""
    if whole := next(filter(is_raw, folders), None):
        return whole
    parts = {name: next((f for f in folders if f.name == name), None) for name in ("leftImg8bit", "gtFine")}
    if not any(parts.values()):
        strange = [folder for folder in folders if has_strange_pictures(folder)]
        if strange:
            find_layout(strange[0].parent)
        return None
    for name, folder in parts.items():
        if folder is None:
            there = next(filter(None, parts.values()))
            raise UserError(f"{there}: expected {name} beside it, found none; attach both archives of Cityscapes")
    (home / "raw").mkdir(parents=True, exist_ok=True)
    for name, folder in parts.items():
        if not (home / "raw" / name).exists():  # or it leads to where the data were attached before
            (home / "raw" / name).unlink(missing_ok=True)
            (home / "raw" / name).symlink_to(folder)
    return home / "raw"


def has_strange_pictures(folder: Path) -> bool:
    """Whether the folder holds pictures that are neither from this repository nor from a run."""
    code = any((above / "unetseg" / "run.py").is_file() for above in (folder, *folder.parents))
    ours = folder.name == "pictures" or code
    return not ours and any(path.suffix.lower() in (".png", ".jpg", ".jpeg") for path in folder.iterdir())
