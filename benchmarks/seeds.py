"""What the fine-tunings change, as mean ± standard deviation over seeds, against a control of equal length.

    python benchmarks/seeds.py --data PROCESSED --out RUNS [--seeds 0 1 2] [--epochs 31 --tune-epochs 12]

The control continues the first stage's recipe (plain cross-entropy, no occlusion) from its best weights for as many
epochs, at the same learning rate, as a fine-tuning. Prints a table and writes RUNS/seeds_<name>.json.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unetseg import checkpoint, evaluation, run
from unetseg.files import write_json
from unetseg.settings import PRESETS, TITLES, Settings

TITLES = {"scratch": TITLES["scratch"], "control": "more epochs of CE (control)"} | TITLES


def train_and_score(name: str, args: argparse.Namespace, seed: int) -> dict:
    """Results of one stage, or of the control, under one seed."""
    home = args.out / f"seed{seed}"
    settings = {"stage": "scratch" if name == "control" else name, "data": str(args.data), "out": str(home / name)}
    if name == "scratch":
        settings |= {"epochs": args.epochs, "channels": args.channels}
    else:
        settings |= {"epochs": args.tune_epochs, "init": str(home / "scratch"), "lr": PRESETS["ce_dice"]["lr"]}
    run.train(Settings(**settings, seed=seed, precision=args.precision))
    return evaluation.evaluate_run(home / name, args.data)


def summarise(args: argparse.Namespace, found: dict[str, list[dict]]) -> dict:
    """Mean and sample standard deviation over the seeds, with their context."""
    first, config = found["scratch"][0], checkpoint.read_config(args.out / f"seed{args.seeds[0]}" / "scratch")
    rows = {}
    for name, results in found.items():
        scores = [evaluation.headline(result) for result in results]
        columns = {key: np.array([score[key] for score in scores], float) for key in scores[0]}
        rows[name] = {
            "title": TITLES[name],
            "mean": {key: float(values.mean()) for key, values in columns.items()},
            "std": {key: float(values.std(ddof=1)) for key, values in columns.items()},
            "minutes": float(np.mean([result["train_seconds"] for result in results]) / 60),
        }
    keys = ("split", "split_note", "num_images", "size", "parameters", "device", "torch", "commit", "precision")
    context = {key: first[key] for key in keys} | {
        "void": first["trained_void"],
        "train_images": len(config["data"]["train"]["images"]),
    }
    epochs = {"epochs": args.epochs, "tune_epochs": args.tune_epochs, "channels": config["settings"]["channels"]}
    classes = list(first["rules"][first["trained_void"]]["classes"])
    return {"name": args.name, "seeds": args.seeds, **context, **epochs, "classes": classes, "stages": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="drawn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=31)
    parser.add_argument("--tune-epochs", type=int, default=12)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "disabled")
    found = {name: [train_and_score(name, args, seed) for seed in args.seeds] for name in TITLES}
    summary = summarise(args, found)
    write_json(args.out / f"seeds_{args.name}.json", summary)
    for name, row in summary["stages"].items():
        cells = [
            f"{key} {row['mean'][key]:.3f}±{row['std'][key]:.3f}" for key in ("mIoU", "person") if key in row["mean"]
        ]
        print(f"{name:<12}", *cells, f"{row['minutes']:.1f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
