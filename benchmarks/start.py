"""From the start of the interpreter to the first training step, second by second, against reading the same bytes.

    python benchmarks/start.py [--images 3000] [--home FOLDER]

A processed split of drawn scenes, its pairs repeated under other names, in the page cache. Writes
benchmarks/results/start.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEGAN = time.time()
CACHE = Path(tempfile.gettempdir()) / "unetseg-bench-cache"  # of the precision that was measured
ROOT = Path(__file__).resolve().parents[1]


def child(processed: Path, run: Path, stage: str, init: str) -> None:
    """A training that ends after its first step; prints the time at which each part was done."""
    import psutil

    marks = {"interpreter": BEGAN - psutil.Process().create_time()}

    def mark(name: str) -> None:
        marks[name] = time.time() - BEGAN - sum(marks.values()) + marks["interpreter"]

    sys.path.insert(0, str(ROOT))
    from unetseg import stages, trainer

    mark("imports")
    step, engine_fit, choose, load = trainer.Trainer.step, stages.engine.fit, stages.choose, stages.load_split

    def first_step(self: trainer.Trainer, *batch: object) -> None:
        mark("first batch")
        step(self, *batch)
        mark("first step")
        print(json.dumps(marks), flush=True)
        os._exit(0)

    def marked(name: str, function: object) -> object:
        def call(*args: object, **more: object) -> object:
            result = function(*args, **more)
            mark(name)
            return result

        return call

    def fit(*args: object) -> None:
        mark("optimiser, augmentation, W&B started")
        engine_fit(*args)

    def chosen(*args: object) -> object:
        mark("identity, network")
        result = choose(*args)
        mark("choice of precision")
        return result

    stages.load_split = lambda folder, name, *void: marked(f"reading {name}", load)(folder, name, *void)
    trainer.Trainer.step, stages.engine.fit, stages.choose = first_step, fit, chosen
    settings = stages.Settings(stage, str(processed), str(run), init=init or None)
    stages.train(settings, *stages.load_sets(settings))


def read_all(processed: Path) -> None:
    """The limit: every byte of the split, read in one process; prints the seconds."""
    paths = sorted(processed.rglob("*_processed/train/*"))
    start = time.perf_counter()
    for path in paths:
        path.read_bytes()
    print(time.perf_counter() - start)


def repeat_pairs(source: Path, target: Path, number: int) -> None:
    """A processed folder of `number` training images, each a copy of one of the source's."""
    if target.is_dir():
        return
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("train", "visualizations"))
    stats = json.loads((source / "stats_train.json").read_text())
    stems = sorted(stats["files"])
    files = {f"{stems[n % len(stems)]}_{n:05d}": stems[n % len(stems)] for n in range(number)}
    for folder, suffix in (("images_processed", ".npy"), ("masks_processed", ".png")):
        (target / folder / "train").mkdir(parents=True)
        for stem, old in files.items():
            shutil.copyfile(source / folder / "train" / f"{old}{suffix}", target / folder / "train" / f"{stem}{suffix}")
    stats["files"] = {stem: stats["files"][old] for stem, old in files.items()}
    (target / "stats_train.json").write_text(json.dumps(stats | {"num_images": number}))


def output_of(*command: object) -> object:
    """What a command of this file prints, as JSON."""
    command = [sys.executable, __file__, *map(str, command)]
    environment = os.environ | {"TQDM_DISABLE": "1", "WANDB_MODE": "offline", "XDG_CACHE_HOME": str(CACHE)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(said.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    args = parser.parse_args()
    from measure import REPEATS, Row, processed_scenes, save

    processed, run = args.home / f"processed_start{args.images}", args.home / "start_run"
    repeat_pairs(processed_scenes(args.home, 64), processed, args.images)
    output_of("read", processed)
    shutil.rmtree(CACHE, ignore_errors=True)
    first_ever = output_of("child", processed, run, "scratch", "")  # measures the precision, once per device
    rounds = []
    for _ in range(REPEATS):
        shutil.rmtree(run, ignore_errors=True)
        rounds.append((output_of("child", processed, run, "scratch", ""), output_of("read", processed)))
    parts = {name: statistics.median(marks[name] for marks, _ in rounds) for name in rounds[0][0]}
    against = "reading the same bytes in one process"
    reading = [marks["reading train"] / limit for marks, limit in rounds]
    whole = [sum(marks.values()) / limit for marks, limit in rounds]
    work = [(sum(marks.values()) - marks["interpreter"] - marks["imports"]) / limit for marks, limit in rounds]
    facts = {"seconds": {"limit": [limit for _, limit in rounds]}, "notes": {"parts": parts, "first_ever": first_ever}}
    what = f"{args.images} images at 256x256"
    rows = [
        Row(f"start of the process to the first step done, {what}", against, "≤ 2", whole, **facts),
        Row("the same without interpreter and imports", against, "≤ 2", work),
        Row("reading, checking and converting alone", against, "≤ 2", reading),
    ]
    print(*rows, sep="\n")
    for name, seconds in parts.items():
        print(f"  {name:<40}{seconds:6.2f} s{first_ever[name]:10.2f} s the first time on a machine")
    save("start", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:6])
    elif sys.argv[1:2] == ["read"]:
        read_all(Path(sys.argv[2]))
    else:
        main()
