"""The main job, as `make run` starts it: data, preprocessing, the three notebooks, the report, a summary.

    python notebooks/run_all.py [--data RAW] [--out runs] [--quick]

Without --data it draws street scenes. Everything is written to a folder of the data's own in OUT; what is there already
is used.
"""

import argparse
import hashlib
import os
import re
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "report")]
if __name__ != "__mp_main__":  # worker processes import this file, too, and need nothing of it
    from build import build, collect
    from execute import NOTEBOOKS, execute, publish
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    from unetseg.files import UserError
    from unetseg.processed import find_split, read_stats
    from unetseg.settings import INHERITED
    from unetseg.tools import doctor, kaggle, preprocess, scenes
    from unetseg.tools.layouts import find_data


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def home_of(data: Path | None, out: Path, quick: bool) -> Path:
    """The folder of a data set: its name, and a hash of where it lies, because names repeat."""
    name = "drawn"
    if data is not None:
        place = os.fsencode(data.resolve())
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', data.resolve().name)}-{hashlib.sha256(place).hexdigest()[:8]}"
    return out / (name + "-quick" * quick)


def prepare(data: Path | None, home: Path, quick: bool) -> tuple[Path, int]:
    """The processed folder, made or reused, and preprocessing's exit status."""
    raw = data
    if raw is None:
        raw = home / "scenes"
        say(f"Drawing street scenes into {raw}")
        scenes.draw_dataset(raw, kaggle.DRAWN)
    data_set, processed = find_data(raw), home / "processed"
    say(f"Preprocessing {raw}")
    size = "x".join(map(str, data_set.quick_size())) if quick else "256"
    status = preprocess.main(["--data_dir", str(raw), "--output_dir", str(processed), "--size", size], data_set)
    if status and not (processed / "stats_train.json").is_file():
        raise SystemExit(status)
    return processed, status


def notebook_settings(stage: str, home: Path, processed: Path, quick: bool) -> dict:
    """The settings that this job changes in a stage's notebook."""
    settings = {"data": str(processed), "out": str(home / stage)}
    epochs_for = kaggle.quick_epochs if quick else kaggle.full_epochs
    settings["epochs"] = epochs_for(stage, len(find_split(processed, "train").checked))
    if stage == "scratch":
        return settings | {"channels": kaggle.QUICK_CHANNELS if quick else INHERITED["channels"]}
    return settings | {"init": str(home / "scratch")}


def announce(processed: Path) -> None:
    """Say how long the full schedule takes on this machine, from a few measured steps."""
    stats, images = read_stats(processed, "train"), {n: len(find_split(processed, n).checked) for n in ("train", "val")}
    text, _ = doctor.forecast(len(stats["classes"]), tuple(stats["size"]), images)
    say(f"The full schedule takes, at {text}; QUICK=1 shortens it")


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
    print("".join(f"\n{remark}" for remark in results["context"]["remarks"]))
    if status:
        print("\nSome files were left out in preprocessing (see above and stats_*.json).")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a raw data set (default: drawn scenes)")
    parser.add_argument("--out", default="runs")
    parser.add_argument("--quick", action="store_true", help="small pictures, small network, short schedule")
    parser.add_argument("--update", action="store_true", help="also replace the notebooks by the executed ones")
    args = parser.parse_args()
    for name in ("data", "out"):
        if getattr(args, name) == "":
            parser.error(f"{name.upper()} is empty: name a folder, or leave {name.upper()}= out")
    return args


def run(args: argparse.Namespace) -> int:
    data, out = args.data and Path(args.data).resolve(), Path(args.out).resolve()
    os.chdir(ROOT)  # where the notebooks work
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    home = home_of(data, out, args.quick)
    processed, status = prepare(data, home, args.quick)
    if not args.quick and not all(list((home / stage).glob("results_*.json")) for stage in NOTEBOOKS):
        announce(processed)
    for number, (stage, name) in enumerate(NOTEBOOKS.items(), start=1):
        settings = notebook_settings(stage, home, processed, args.quick)
        say(f"Notebook {number} of 3: {name} ({settings['epochs']} epochs)")
        execute(Path("notebooks", name), home / "notebooks" / name, settings)
    for stage, name in NOTEBOOKS.items() if args.update else ():  # at the end: runs say whether their code is committed
        publish(home / "notebooks" / name, Path("notebooks", name), stage)
    say("Building the report")
    results = collect(home)
    build(home / "pictures", [results], home / "UNet_Model_Training_Report.pdf")
    summarise(home, results, status)
    return status


def main() -> int:
    args = parse_args()
    try:
        return run(args)
    except CellExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            return 130
        ours = error.ename in ("UserError", "SettingsError", "BadFile", "FileError", "NoSplit", "TrainingStopped")
        print(f"error: {error.evalue}" if ours else str(error), file=sys.stderr)
        return 1
    except (UserError, DeadKernelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
