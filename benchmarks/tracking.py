"""What logging to W&B costs a training: time in its own process, and of the processor in W&B's processes.

    python benchmarks/tracking.py [--home FOLDER] [--epochs 9]

The default preset on 64 drawn scenes, offline: epochs of eight steps, so that logging weighs as much as it ever does.
Writes benchmarks/results/tracking.json.
"""

import argparse
import itertools
import os
import shutil
import time
from pathlib import Path

import psutil
from measure import RESULTS, environment, processed_scenes

from unetseg import stages
from unetseg.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    parser.add_argument("--epochs", type=int, default=9)
    args = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    run, log_epoch, seconds, busy = args.home / "tracking_run", stages.log_epoch, [], []
    shutil.rmtree(run, ignore_errors=True)

    def timed(*record: object, **more: object) -> None:
        children = psutil.Process().children(recursive=True)
        busy.append(sum(sum(child.cpu_times()[:2]) for child in children))
        start = time.perf_counter()
        log_epoch(*record, **more)
        seconds.append(time.perf_counter() - start)

    stages.log_epoch = timed
    settings = stages.Settings("scratch", str(processed_scenes(args.home, 64)), str(run), epochs=args.epochs)
    history = stages.train(settings, *stages.load_sets(settings))
    training = sum(64 / row["images_per_second"] for row in history)
    cpu = [(later - earlier) for earlier, later in itertools.pairwise(busy[1:])]
    facts = {
        "seconds_in_log": seconds,
        "share_of_the_steps": sum(seconds) / training,
        "wandb_cpu_seconds_per_epoch": cpu,
        "wandb_share_of_the_cores": [value / row["seconds"] / os.cpu_count() for value, row in zip(cpu, history[2:])],
        "wandb_cpu_seconds_to_the_first_epoch": busy[0],
    }
    write_json(RESULTS / "tracking.json", {"name": "tracking", **environment(), **facts})
    for name, value in facts.items():
        print(f"{name:<40}{value if isinstance(value, float) else [round(one, 4) for one in value]}")


if __name__ == "__main__":
    main()
