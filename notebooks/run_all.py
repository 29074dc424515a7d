"""The main job, as `make run` starts it: data, preprocessing, the three notebooks, the report, a summary.

    python notebooks/run_all.py [--data RAW] [--out runs] [--quick]

Without --data it draws street scenes. Everything is written to OUT/<name of the data>; what is there already is used.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "report")]
from build import build, collect
from execute import NOTEBOOKS, execute, publish
from nbclient.exceptions import CellExecutionError, DeadKernelError

from unetseg import place, scenes, stages
from unetseg.processed import find_split
from unetseg.raw import find_layout

QUICK_SIZE = {"cityscapes": "192x96", "camvid": "144x108"}  # the shape of the originals, few pixels
QUICK_CHANNELS = 16
QUICK_IMAGES = {"scratch": 2000, "weighted_ce": 800, "ce_dice": 800}  # images seen by a quick training of each stage


def from_root(path: Path) -> Path:
    """A path as seen from the repository's root, where the notebooks work; absolute when it lies elsewhere."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def prepare(args: argparse.Namespace, home: Path) -> tuple[Path, int]:
    """The processed folder, made or reused, and preprocessing's exit status."""
    raw = args.data
    if raw is None:
        raw = home / "scenes"
        say(f"Drawing street scenes into {raw}")
        scenes.draw_dataset(raw, place.DRAWN)
    layout, processed = find_layout(raw), home / "processed"
    say(f"Preprocessing {raw}")
    status = place.preprocess(raw, processed, QUICK_SIZE[layout] if args.quick else "256")
    if status and not (processed / "stats_train.json").is_file():
        raise SystemExit(status)
    return processed, status


def notebook_settings(stage: str, home: Path, processed: Path, quick: bool) -> dict:
    """The settings that this job changes in a stage's notebook."""
    settings = {"data": str(processed), "out": str(home / stage)}
    if stage != "scratch":
        settings["init"] = str(home / "scratch")
    num_images = len(find_split(processed, "train").stems)
    quick_epochs = max(2, min(60, QUICK_IMAGES[stage] // num_images))
    settings["epochs"] = quick_epochs if quick else stages.STAGES[stage].epochs
    if stage == "scratch":
        settings["channels"] = QUICK_CHANNELS if quick else 32
    return settings


def announce(processed: Path, home: Path) -> None:
    """Say how long the full schedule takes on this machine, from a few measured steps."""
    settings = stages.resolve(stages.Settings("scratch", str(processed), str(home / "scratch")))
    per_epoch = stages.forecast(settings, *stages.load_sets(settings)) / settings.epochs
    hours = {name: per_epoch * stage.epochs / 3600 for name, stage in stages.STAGES.items()}
    parts = ", ".join(f"{name} {hour:.1f} h" for name, hour in hours.items())
    say(f"The full schedule takes about {sum(hours.values()):.1f} hours here ({parts}); QUICK=1 shortens it")


def summarise(home: Path, results: dict, status: int) -> None:
    say("Scores (void={void}, {size[0]}x{size[1]}, {split_note})".format(**results["context"]))
    names = [*results["context"]["classes"], "mIoU", "accuracy"]
    print(f"{'':<14}" + "".join(f"{name[:11]:>12}" for name in names) + f"{'minutes':>9}")
    for stage, run in results["runs"].items():
        values = [run["scores"].get(name) for name in names]
        row = "".join(f"{value:>12.4f}" if value is not None else f"{'absent':>12}" for value in values)
        print(f"{stage:<14}{row}{run['minutes']:>9.1f}")
    print(f"\nexecuted notebooks  {home / 'notebooks'}")
    print(f"pictures            {home / 'pictures'}, {home / 'processed' / 'visualizations'}")
    for folder in sorted(home.glob("*/wandb/*run-*")):
        print(f"W&B run folder      {folder}")
    print(f"report              {home / 'UNet_Model_Training_Report.pdf'}")
    if status:
        print("\nSome files were left out in preprocessing (see above and stats_*.json).")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a Cityscapes or CamVid root (default: drawn scenes)")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--quick", action="store_true", help="small pictures, small network, short schedule")
    parser.add_argument("--update", action="store_true", help="also replace the notebooks by the executed ones")
    args = parser.parse_args()
    args.data, args.out = args.data and from_root(args.data), from_root(args.out)
    os.chdir(ROOT)
    home = args.out / ((args.data.resolve().name if args.data else "drawn") + ("-quick" if args.quick else ""))
    try:
        processed, status = prepare(args, home)
        if not args.quick and not all(list((home / stage).glob("results_*.json")) for stage in NOTEBOOKS):
            announce(processed, home)
        for number, (stage, name) in enumerate(NOTEBOOKS.items(), start=1):
            settings = notebook_settings(stage, home, processed, args.quick)
            say(f"Notebook {number} of 3: {name} ({settings['epochs']} epochs)")
            execute(Path("notebooks", name), home / "notebooks" / name, settings)
            if args.update:
                publish(home / "notebooks" / name, Path("notebooks", name), stage)
        say("Building the report")
        results = collect(home)
        build(home / "pictures", [results], home / "UNet_Model_Training_Report.pdf")
    except CellExecutionError as error:
        print(f"error: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    except (ValueError, OSError, DeadKernelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    summarise(home, results, status)
    return status


if __name__ == "__main__":
    sys.exit(main())
