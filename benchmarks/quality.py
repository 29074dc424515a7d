"""How much sooner the recipe reaches the quality of the published one, on the folds of the training clips.

    python benchmarks/quality.py --data PROCESSED [--epochs 26]

The published recipe's val curves are those of its runs in report/results/camvid7; the target is their mean at its best
epoch, a choice in its favour, and its epochs are charged at the seconds that a step takes here, in fp32. Ours are timed
from process start to process end. Writes benchmarks/results/quality.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from measure import ROOT, Contender, Row, processed_scenes, quietly, save
from training import BATCH, common_loop, network

from unetseg.checkpoint import read_config, read_history

STEPS = 1  # of the published recipe in one measurement


def published() -> tuple[float, int]:
    """Mean mIoU over folds and seeds at the best epoch, and that epoch."""
    curves = []
    for path in (ROOT / "report" / "results" / "camvid7").glob("published-*.npz"):
        with np.load(path) as file:
            curves.append(json.loads(str(file["facts"]))["val_miou"])
    curve = np.mean(curves, axis=0)
    return float(curve.max()), int(curve.argmax()) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CamVid in camvid7 at 256x256, processed")
    parser.add_argument("--epochs", type=int, default=26, help="of the scratch preset with a 16/4 U-Net (26)")
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    args = parser.parse_args()
    processed_scenes(args.home)
    (target, best), seconds, reached = published(), {"ours": [], "theirs": []}, []
    with tempfile.TemporaryDirectory() as folder:
        for fold in range(4):
            run = Path(folder) / f"fold{fold}"
            shape = "--channels", 16, "--depth", 4, "--epochs", args.epochs, "--fold", fold
            seconds["ours"].append(quietly("train", "scratch", "--data", args.data, "--out", run, *shape))
            with Contender(common_loop, network, ("published",), args.home, STEPS) as loop:
                step = loop.run() / STEPS
            steps = -(-len(read_config(run)["data"]["train"]["images"]) // BATCH)
            seconds["theirs"].append(best * steps * step)
            reached.append(read_history(run)[-1]["val_miou"])
            said = f"fold {fold}: {seconds['ours'][-1]:.0f} s, mIoU {reached[-1]:.3f}; {step:.2f} s a step of theirs"
            print(said, flush=True)
    what = f"scratch preset, 16/4 U-Net, {args.epochs} epochs, from process start to end"
    against = f"published recipe in the loop most people run, {best} epochs (the best measured)"
    notes = {"epochs": args.epochs, "target": target, "reached": float(np.mean(reached)), "folds": reached}
    row = Row(what, against, [b / a for a, b in zip(seconds["ours"], seconds["theirs"])], seconds, notes)
    print(row)
    if notes["reached"] < target:
        raise SystemExit("the target was not reached, so nothing is written; use more --epochs")
    save("quality", [row])


if __name__ == "__main__":
    main()
