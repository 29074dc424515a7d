"""Every score, duration and throughput that a text claims for this project is one in a results file."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from execute import NOTEBOOKS

from unetseg.evaluation.robustness import UNSEEN
from unetseg.files import read_json

RESULTS = ROOT / "report" / "results"
CLAIM = r"(?<![\w.])\.\d{2,3}\b|\d[\d.]* (?:points|images/s|minutes)"  # .71, 2.7 points, 3.6 minutes
WRITTEN = r"<!-- (\w+): written by.*?<!-- end of \1 -->"  # tables that have tests of their own
ANSWER = r" on \d+ of the \d+ val images \(split.*"  # the rest of what is filled in as the notebook runs
ROWS = read_json(RESULTS / "camvid7" / "summary.json")["rows"]
SCREEN, OCCLUDERS = read_json(RESULTS / "screen.json"), read_json(RESULTS / "occluders.json")["rows"]
SPEEDS = read_json(ROOT / "benchmarks" / "results" / "gpu_h200.json")["images_per_second"]


def facts(name):
    return json.loads(str(np.load(RESULTS / f"{name}.npz")["facts"]))


def points(row, score="miou"):
    return f"{abs(100 * ROWS[row][f'{score}_against_control']['difference']):.1f} points".removeprefix("0")


def mean(row, key, side="mean"):
    """Of a row, or of its control under the same seeds."""
    return f"{ROWS[row][side][key]:.2f}".lstrip("0")


def lost(row, side="mean", kinds=UNSEEN):
    values = [ROWS[row][side][f"lost_under_occluders {kind}"] for kind in kinds]
    return f"{np.mean(values):.3f}".lstrip("0")


def shares(row):
    """Percent of what the control loses under stripes, discs and pasted instances."""
    sides = [[ROWS[row][side][f"lost_under_occluders {kind}"] for kind in UNSEEN] for side in ("mean", "control_mean")]
    return [f"{100 * ours / theirs:.0f} %" for ours, theirs in zip(*sides)]


def signed(value, digits=1):
    return f"{value:+.{digits}f}".replace("-", "−")


def people_over_predicted(joint):
    sides = "control_mean", "mean"
    shares = [mean("weighted_ce", f"{score} person", side) for score in ("recall", "precision") for side in sides]
    return joint.format(*shares, points("weighted_ce", "person_iou"))


def shown(*numbers, digits=3):
    return " | ".join(f"{number:.{digits}f}".removeprefix("0") for number in numbers)


ELEVEN, SEVEN, DRAWN = map(facts, ("camvid11/scratch-seed0", "weights/camvid7-seed0", "unet-drawn/small-seed0"))
SIZES = [f"{facts(f'camvid7/{row}-seed0-fold0')['parameters'] / 1e6:.1f}" for row in ("scratch", "published")]
STAGES = "weighted_ce_occlusion", "ce_dice_occlusion"
SECOND, THIRD = ([points(row, "person_iou"), lost(row), lost(row, "control_mean")] for row in STAGES)
UNDER = ["{} under stripes, {} under discs, {} under pasted".format(*shares(row)) for row in STAGES]
PLAIN = " instead of ".join(lost(STAGES[1], side, UNSEEN[1:]) for side in ("mean", "control_mean"))
ALONE = f"{lost('occlusion')} instead of {lost('occlusion', 'control_mean')}"
MINUTES = f"{ELEVEN['train_seconds'] / 60:.1f} minutes on an H200"
FIRST = ["one", "two", "three", "four", "five"][round(read_json(RESULTS / "first-run.json")["seconds"] / 60) - 1]
CLAIMS = {
    "README.md": [f"The first line takes {FIRST} minutes on two cores", UNDER[1]],
    "docs/results.md": [
        f"lifts mIoU by {points('scratch')} over the published one with a network of {' instead of '.join(SIZES)} M",
        people_over_predicted("recall rises from {} to {}, precision falls from {} to {}, IoU\n  falls by {}."),
        f"recall {mean('inverse', 'recall person')}, precision {mean('inverse', 'precision person')}",
        f"gives people {THIRD[0]} over",
        f"lose {THIRD[1]} instead of {THIRD[2]}: {UNDER[1]}",
        f"stripes it is {PLAIN}",
        f"as well ({SECOND[1]} instead of {SECOND[2]}), but",
        f"people lose {SECOND[0]}",
        f"people lose {points('occlusion', 'person_iou')} on clear images, and visible pixels {ALONE} under",
        f"people gain {points('ce_dice', 'person_iou')}",
        f"gives people {points('weighted_ce_dice_random', 'person_iou')}.",
        f"adds {100 * (ROWS['control']['mean']['flipped mIoU'] - ROWS['control']['mean']['scores mIoU']):.1f} points",
        f"({signed(SCREEN['average_against_last'], 2)} points), and over six",
        f"({signed(SCREEN['long_average_against_last'], 2)})",
        f"480x360 in {MINUTES}: mIoU {shown(ELEVEN['scores']['mIoU'])}",
    ],
    "weights/README.md": [
        MINUTES,
        f"mIoU\n{shown(ELEVEN['scores']['mIoU'])}, {shown(ELEVEN['flipped']['mIoU'])} as",
        f"{SEVEN['train_seconds'] / 60:.0f} minutes on two cores",
        f"mIoU {shown(SEVEN['scores']['mIoU'])}, {shown(SEVEN['flipped']['mIoU'])} as",
        f"mIoU {shown(DRAWN['scores']['mIoU'])}, person {shown(DRAWN['scores']['person'])}",
        *{f"{facts['parameters'] / 1e6:.1f} M parameters" for facts in (ELEVEN, SEVEN, DRAWN)},
    ],
    "notebooks/Fine_tuning_with_Weighted_CE_and_Augmentation.ipynb": [
        people_over_predicted(
            "people from {} to {} and lower their precision from {} to {}, so that their IoU falls by {}"
        ),
        f"visible pixels lose {SECOND[1]} instead of {SECOND[2]}",
        UNDER[0],
    ],
    "notebooks/Fine_tuning_with_combined_CE_and_DICE_Loss.ipynb": [
        f"people gain {THIRD[0]} of IoU",
        f"lose {THIRD[1]} instead of {THIRD[2]} under",
        UNDER[1],
        f"weights alone take {points('weighted_ce', 'person_iou')}",
    ],
}
for row in OCCLUDERS.values():
    cells = [row["mean"][key] for key in ("scores mIoU", "scores person")]
    gained = " | ".join(signed(100 * row[f"{score}_against_control"]["difference"]) for score in ("miou", "person_iou"))
    lost_by_kind = shown(*(row["mean"][f"lost_under_occluders {kind}"] for kind in UNSEEN))
    CLAIMS["docs/results.md"].append(f"| {row['title']} | {shown(*cells)} | {gained} | {lost_by_kind} |")
for stage, name in NOTEBOOKS.items():
    run = read_json(RESULTS / "drawn-quick.json")["runs"][stage]
    answer = f"mIoU **{run['scores']['mIoU']:.3f}**, person IoU **{run['scores']['person']:.3f}**"
    CLAIMS.setdefault(f"notebooks/{name}", []).append(f"**Answer.** {answer}")
for effect in SCREEN["effects"].values():
    cells = (f"{signed(effect[score])} ± {effect[score + '_error']}" for score in ("miou", "person"))
    CLAIMS["docs/results.md"].append(f"| {effect['what']} | {' | '.join(cells)} |")
for speeds in SPEEDS.values():
    CLAIMS["docs/results.md"].append(f"| {shown(*(speeds[kind] for kind in ('fp32', 'fp16', 'bf16')), digits=0)} |")
for card in (ELEVEN, SEVEN):
    for name in card["classes"]:
        row = shown(*(card[score][name] for score in ("scores", "precision", "recall")))
        CLAIMS["weights/README.md"].append(f"| {name} | {row} |")
TEXTS = ["README.md", "kaggle/README.md", "report/report.typ", "weights/README.md"]
TEXTS += [str(path.relative_to(ROOT)) for folder in ("docs/*.md", "notebooks/*.ipynb") for path in ROOT.glob(folder)]


def read(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return text


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_claimed_was_measured(name):
    text = read(name)
    for claim in CLAIMS.get(name, ()):
        assert claim in text, claim
        text = text.replace(claim, "")
    text = re.sub(ANSWER, "", re.sub(WRITTEN, "", text, flags=re.DOTALL))
    assert not re.findall(CLAIM, text)
