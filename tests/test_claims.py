"""Every score, duration and throughput that a text claims for this project is one in a results file."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from execute import NOTEBOOKS

from unetseg.evaluation import verdicts
from unetseg.evaluation.robustness import UNSEEN
from unetseg.files import read_json
from unetseg.tools.plan import statistics

RESULTS, SCORES = ROOT / "report" / "results", ("miou", "person_iou")
CLAIM = r"(?<![\w.])(?:0?\.\d{3}|\.\d\d)\b|\d[\d.]* (?:points|images/s|minutes|times as)"  # .71, 2.7 points
WRITTEN = r"<!-- (\w+): written by.*?<!-- end of \1 -->"  # tables that have tests of their own
ANSWER = r" on \d+ of the \d+ val images \(split.*"  # the rest of what is filled in as the notebook runs
ROWS, WEIGHTING, QUICK = (read_json(RESULTS / p / "summary.json")["rows"] for p in ("camvid7", "weighting", "drawn"))
SCREEN, OCCLUDERS = read_json(RESULTS / "screen.json"), read_json(RESULTS / "occluders.json")["rows"]
SPEEDS = read_json(ROOT / "benchmarks" / "results" / "gpu_h200.json")["images_per_second"].values()


def facts(name):
    return json.loads(str(np.load(RESULTS / f"{name}.npz")["facts"]))


def points(row, score="miou", rows=ROWS):
    return f"{abs(100 * rows[row][f'{score}_against_control']['difference']):.1f} points".removeprefix("0")


def weighted(row, key, side="mean"):
    return shown(WEIGHTING[row][side][key], digits=2)


def lost(row, side="mean", kinds=UNSEEN):
    return shown(np.mean([ROWS[row][side][f"lost_under_occluders {kind}"] for kind in kinds]))


def shares(row):
    sides = [[ROWS[row][side][f"lost_under_occluders {kind}"] for kind in UNSEEN] for side in ("mean", "control_mean")]
    return [f"{100 * ours / theirs:.0f} %" for ours, theirs in zip(*sides)]


def pair(mean, joint=" and person "):
    return shown(mean["scores mIoU"], mean["scores person"]).replace(" | ", joint)


def signed(value, digits=1):
    return f"{value:+.{digits}f}".replace("-", "−")


def people_over_predicted(joint):
    sides = "control_mean", "mean"
    shares = [weighted("weighted_ce", f"{score} person", side) for score in ("recall", "precision") for side in sides]
    return joint.format(*shares, points("weighted_ce", "person_iou", WEIGHTING))


def shown(*numbers, digits=3):
    return " | ".join(f"{number:.{digits}f}".removeprefix("0") for number in numbers)


ELEVEN, SEVEN, DRAWN = map(facts, ("camvid11/scratch-seed0", "weights/camvid7-seed0", "unet-drawn/small-seed0"))
SIZES = [f"{facts(f'camvid7/{row}-seed1-fold0')['parameters'] / 1e6:.1f}" for row in ("scratch", "published")]
STAGES = "weighted_ce_occlusion", "ce_dice_occlusion"
SECOND, THIRD = ([points(row, "person_iou"), lost(row), lost(row, "control_mean")] for row in STAGES)
UNDER = ["{} of the control's drop under stripes, {} under discs, {} under pasted".format(*shares(s)) for s in STAGES]
BOTH = {(row, s): found for row in ROWS for s in SCORES if "p" in (found := ROWS[row].get(f"{s}_against_control", {}))}
P = [shown(found[STAGES[1], "person_iou"]["p_holm"], digits=2) for found in (BOTH, verdicts(BOTH))]
START = points("ce_dice_random", "person_iou"), shown(BOTH["ce_dice_random", "person_iou"]["p_holm"])
SCENES = "scenes/varied-seed1", "scenes/present-seed1"
SMALL = [f"screening/{row}-seed0" for row in ("short", "long", "long_control", "long_ce_dice_occlusion")]
LONG = {row: f"camvid7/{row}-seed1" for row in ("scratch", "wide")} | {name: name for name in SMALL}
LONG |= {"narrow": "camvid7/long-seed1", "widened": "widened/seed1"} | {n: n for n in SCENES}
FOLDS = dict.fromkeys(LONG, (0, 2)) | {"narrow": (1, 3), "widened": (1, 3)} | dict.fromkeys(SCENES, (0, 1))
LONG = {row: [(facts(f"{name}-fold{n}"), None) for n in FOLDS[row]] for row, name in LONG.items()}
LONG = {row: statistics({0: folds})["mean"] for row, folds in LONG.items()}
PAIRS = {row: pair(mean) for row, mean in LONG.items()}
WIDE = PAIRS["wide"], PAIRS["scratch"].replace("person ", "")
LESS = {row: shown(mean["lost under occluders"]) for row, mean in LONG.items()}
RANDOM, LONGEST, CONTROL = ROWS["ce_dice_drawn"]["control_mean"], ROWS["long"]["mean"], ROWS["ce_dice"]["control_mean"]
GAINS = [points(row, score) for score in ("person_iou", "miou") for row in ("ce_dice_drawn", "long")]
WORSE = [shown(mean["lost under occluders"]) for mean in (LONGEST, CONTROL)]
CALIBRATED = [shown(ROWS[row]["mean"]["calibration_error"]) for row in (STAGES[1], "control")]
OPTIMISM = [ROWS[row]["mean"]["val mIoU"] - ROWS[row]["mean"]["scores mIoU"] for row in ("scratch", "control", *STAGES)]
OPTIMISM = f"{100 * min(OPTIMISM):.0f} to {100 * max(OPTIMISM):.0f} points"
MINUTES = f"{ELEVEN['train_seconds'] / 60:.1f} minutes on an H200"
FIRST = ["one", "two", "three", "four", "five"][round(read_json(RESULTS / "first-run.json")["seconds"] / 60) - 1]
CLAIMS = {
    "README.md": [
        f"The first line takes {FIRST} minutes on two", f"better (p {P[0]}; {P[1]} if", UNDER[1],
        f"mIoU {pair(LONGEST)} after 240 epochs (control: {pair(CONTROL)},",
        "drawn weights ({}) than from the longer training ({}), mIoU less ({} and {})".format(*GAINS),
        "loses more under occluders ({}, control {})".format(*WORSE), f"{WIDE[0]} after the 80 epochs (16/4: {WIDE[1]}",
        f"mIoU {PAIRS['narrow']} before, {PAIRS['widened']} after", "fine-tuning: {} (p {}, two".format(*START),
    ],
    "docs/results.md": [
        f"lifts mIoU by {points('scratch')} over the published one with a network of {' instead of '.join(SIZES)} M",
        people_over_predicted("recall rises from {} to {}, precision falls from {} to {}, and IoU falls by {}."),
        f"recall {weighted('inverse', 'recall person')}, precision {weighted('inverse', 'precision person')}",
        f"raises the IoU of people by {THIRD[0]} over the control (p {P[0]}; {P[1]} if both scores",
        f"drops by {THIRD[1]} (control: {THIRD[2]}): {UNDER[1]}", f"drops by {SECOND[1]}; control: {SECOND[2]})",
        f"({shares(STAGES[0])[2]} of the control's drop)", f"{WIDE[0]} after the 80 epochs of CE (16/4: {WIDE[1]})",
        "the drop is {} against {}".format(*(lost(STAGES[1], side, UNSEEN[1:]) for side in ("mean", "control_mean"))),
        f"IoU of people falls by {SECOND[0]}, mIoU by {points(STAGES[0])}.", f"{pair(LONGEST)} after 240, 60",
        f"IoU of people rises by {points('ce_dice', 'person_iou')}", f"falls by {points('occlusion', 'person_iou')},",
        f"visible pixels drops by {lost('occlusion')} (control: {lost('occlusion', 'control_mean')})",
        f"cost people {points('occlusion', 'person_iou')} and {points('weighted_ce', 'person_iou', WEIGHTING)}",
        "calibration error is {} after CE + Dice + occlusion, and {} after".format(*CALIBRATED),
        f"raises the IoU of people by {points('weighted_ce_dice_random', 'person_iou', WEIGHTING)}.",
        f"mIoU {pair(RANDOM)} from random weights after 96 epochs, {pair(ROWS['ce_dice_drawn']['mean'])} from `unet",
        "People gain {} from the drawn weights and {} from the longer schedule; mIoU gains {} and {}.".format(*GAINS),
        "loses {} of mIoU on visible pixels under the unseen ones (control: {})".format(*WORSE),
        "mIoU {} after 80 epochs, {} after 200, {} after 16 more of CE".format(*map(PAIRS.get, SMALL)),
        f"{PAIRS[SMALL[3]]} after 16 of CE + Dice", "people by {} over the control (p {})".format(*START),
        f"{PAIRS['narrow']} before, {PAIRS['widened']} after", f"({signed(SCREEN['long_average_against_last'], 2)})",
        "{} after 80, {} after 200, {} after 16 more of CE, {} after the third stage".format(*map(LESS.get, SMALL)),
        f"({points('weighted_ce', rows=QUICK)} and {points('ce_dice', rows=QUICK)}), and the third stage "
        f"also {points('ce_dice', 'person_iou', QUICK)} of", f"at half size (control: {pair(CONTROL)})",
        f"adds {100 * (ROWS['control']['mean']['flipped mIoU'] - ROWS['control']['mean']['scores mIoU']):.1f} points",
        f"({signed(SCREEN['average_against_last'], 2)} points), and over six", f"the control has mIoU {pair(CONTROL)};",
        f"480x360 in {MINUTES}: mIoU {shown(ELEVEN['scores']['mIoU'])}", f"score {OPTIMISM} more",
        "lead to mIoU {}, those of 640 present ones to mIoU {}.".format(*map(PAIRS.get, SCENES)),
    ],
    "weights/README.md": [
        MINUTES, f"{SEVEN['train_seconds'] / 60:.0f} minutes on two cores",
        f"mIoU {pair(LONGEST)} (one seed); the same runs have mIoU {shown(LONGEST['val mIoU'])} on",
        *(f"mIoU {shown(f['scores']['mIoU'])}, {shown(f['flipped']['mIoU'])} as" for f in (ELEVEN, SEVEN)),
        f"mIoU {shown(DRAWN['scores']['mIoU'])}, person {shown(DRAWN['scores']['person'])}",
        *{f"{facts['parameters'] / 1e6:.1f} M parameters" for facts in (ELEVEN, SEVEN, DRAWN)},
    ],
    "notebooks/Model_Training_UNet_From_scratch.ipynb": [
        f"mIoU {pair(ROWS['scratch']['mean'])} after 80", f"recipe {pair(ROWS['published']['mean'])} after 25",
        f"mIoU is {pair(LONGEST)} (one seed)", f"mIoU {WIDE[0]} against {WIDE[1]}.",
    ],
    "notebooks/Fine_tuning_with_Weighted_CE_and_Augmentation.ipynb": [
        people_over_predicted("from {} to {} and lower their precision from {} to {}, so that their IoU falls by {}"),
        f"IoU of people falls by {SECOND[0]}", f"drops by {SECOND[1]} (control: {SECOND[2]}): {UNDER[0]}",
    ],
    "notebooks/Fine_tuning_with_combined_CE_and_DICE_Loss.ipynb": [
        f"people gain {THIRD[0]} of IoU", f"drops by {THIRD[1]} (control: {THIRD[2]}): {UNDER[1]}",
        f"which alone take {points('weighted_ce', 'person_iou', WEIGHTING)}",
    ],
}  # fmt: skip
for row in OCCLUDERS.values():
    gained = " | ".join(signed(100 * row[f"{score}_against_control"]["difference"]) for score in ("miou", "person_iou"))
    lost_by_kind = shown(*(row["mean"][f"lost_under_occluders {kind}"] for kind in UNSEEN))
    CLAIMS["docs/results.md"].append(f"| {row['title']} | {pair(row['mean'], ' | ')} | {gained} | {lost_by_kind} |")
for stage, name in NOTEBOOKS.items():
    run = read_json(RESULTS / "drawn-quick.json")["runs"][stage]
    answer = f"mIoU **{run['scores']['mIoU']:.3f}**, person IoU **{run['scores']['person']:.3f}**"
    CLAIMS[f"notebooks/{name}"].append(f"**Answer.** {answer}")
for effect in SCREEN["effects"].values():
    cells = (f"{signed(effect[score])} ± {effect[score + '_error']}" for score in ("miou", "person"))
    CLAIMS["docs/results.md"].append(f"| {effect['what']} | {' | '.join(cells)} |")
CLAIMS["docs/results.md"] += [f"| {shown(*(s[k] for k in ('fp32', 'fp16', 'bf16')), digits=0)} |" for s in SPEEDS]
for card, name in [(c, n) for c in (ELEVEN, SEVEN) for n in c["classes"]]:
    row = shown(*(card[score][name] for score in ("scores", "precision", "recall")))
    CLAIMS["weights/README.md"].append(f"| {name} | {row} |")
for path in RESULTS.glob("drives/*/*.npz"):
    row, found = path.stem.split("-")[0], facts(path.relative_to(RESULTS).with_suffix(""))["scores"]
    CLAIMS["docs/results.md"].append(f"| {path.parent.name} | {row} | {shown(found['mIoU'], found['person'])} |")
TEXTS = [str(p.relative_to(ROOT)) for g in ("*.md", "*/*.md", "*/*.typ", "*/*.ipynb") for p in ROOT.glob(g)]


def read(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    text = re.sub(ANSWER, "", re.sub(WRITTEN, "", text, flags=re.DOTALL))
    return " ".join(text.split())


def test_the_verdicts_are_those_that_the_texts_describe():
    said = {"scratch": "better better", "control": "better better", "weighted_ce_occlusion": "worse worse"}
    for row, words in (said | dict.fromkeys((STAGES[1], "ce_dice_random"), "not distinguishable better")).items():
        assert " ".join(ROWS[row][f"{score}_against_control"]["verdict"] for score in SCORES) == words
    alone = [ROWS[row]["person_iou_against_control"]["difference"] for row in ("occlusion", "ce_dice")]
    assert alone[0] < 0 < alone[1] and ROWS["occlusion"]["miou_against_control"]["difference"] < 0


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_claimed_was_measured(name):
    text = read(name)
    for claim in CLAIMS.get(name, ()):
        assert claim in text, claim
        text = text.replace(claim, "")
    assert not re.findall(CLAIM, text)
