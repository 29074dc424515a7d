"""Folds that hold out stretches of time, and plans of runs: what is done, skipped, resumed, summed up, refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, command

from unetseg.data import Batches, load_split
from unetseg.evaluation import evaluate_run, read_results
from unetseg.evaluation.compare import pooled_miou
from unetseg.files import UserError, exclusive, read_json
from unetseg.processed import find_split, hold_out, moment
from unetseg.settings import INHERITED, Settings, with_preset
from unetseg.tools import plan

CLIP = [f"0001TP_{number:06d}" for number in range(6690, 8521, 30)]  # 62 seconds, a frame each
PLAN = """
name = "try"
precision = "fp32"
seeds = [0, 1]
folds = [0, 1]
[settings]
channels = 4
depth = 2
epochs = 1
[rows.scratch]
[rows.control]
init = "scratch"
[rows.ce_dice]
title = "CE + Dice"
stage = "ce_dice"
init = "scratch"
control = "control"
"""


@pytest.fixture
def a_plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_folds_hold_out_every_frame_once_and_train_ten_seconds_away():
    held = [hold_out(CLIP, part, 4) for part in range(4)]
    assert sorted(stem for inside, _, _ in held for stem in inside) == CLIP
    for inside, kept, timed in held:
        seconds = [np.array([moment(stem)[1] for stem in stems]) for stems in (inside, kept)]
        assert timed and np.abs(seconds[0][:, None] - seconds[1]).min() >= 10
        assert len(inside) in (15, 16) and np.ptp(seconds[0]) == len(inside) - 1
    assert [len(kept) for _, kept, _ in held] == [37, 29, 28, 38]  # 62 less 16 or 15, and nine on each side


def test_clips_too_short_to_cut_are_held_out_whole():
    clips = [f"aachen_{clip:06d}_{frame:06d}" for clip in range(8) for frame in range(9)]
    inside, kept, _ = hold_out(clips, 1, 4)
    assert {stem[7:13] for stem in inside} == {"000001", "000005"} and len(inside) + len(kept) == len(clips)


def test_where_names_tell_no_time_folds_are_random_and_complete(processed):
    splits = [find_split(processed, f"fold{k}") for k in range(4)]
    assert sorted(stem for split in splits for stem in split.checked) == sorted(find_split(processed, "train").checked)
    for k, split in enumerate(splits):
        rest = find_split(processed, f"not_fold{k}")
        assert not {*rest.checked} & {*split.checked} and len(rest.checked) + len(split.checked) == 6
        assert "at random" in split.note and f"fold {k} of 4" in split.note


def test_a_run_with_a_fold_is_scored_on_it(processed, tmp_path):
    tiny = ["--channels", 4, "--depth", 1, "--epochs", 1, "--fold", 2]
    assert command("train", "scratch", "--data", processed, "--out", tmp_path / "run", *tiny) == 0
    assert command("evaluate", tmp_path / "run", "--data", processed) == 0
    results = read_json(tmp_path / "run" / "results_fold2.json")
    short = "trained for 1 of the usual 100 epochs: too few to read anything into the scores"
    assert results["images"] == find_split(processed, "fold2").images and results["remarks"][0] == short
    assert command("evaluate", tmp_path / "run", "--data", processed, "--split", "train") == 0
    said = read_json(tmp_path / "run" / "results_train.json")["remarks"]
    assert said[::2] == [short, "4 of these images were in the run's train split: they are not unseen"]
    assert command("evaluate", tmp_path / "run", "--data", processed, "--split", "fold0") == 0
    assert read_results(tmp_path / "run")["split"] == "fold2"
    for start, out in (("run", "heir"), ("heir", "heir of the heir")):
        tune = ["--init", tmp_path / start, "--out", tmp_path / out, "--epochs", 1, "--fold", 1]
        assert command("train", "ce_dice", "--data", processed, *tune) == 0
    assert "started from weights of other training data" in evaluate_run(tmp_path / out, processed)["remarks"][-1]


def test_half_size_is_the_mean_of_four_pixels_and_the_class_under_the_centre(processed):
    train_set = load_split(processed, "train")
    images, masks = train_set.batch(torch.tensor([0]), torch.device("cpu"))
    half, half_masks = train_set.batch(torch.tensor([0]), torch.device("cpu"), 2)
    assert torch.allclose(half[0, :, 3, 5], images[0, :, 6:8, 10:12].mean(dim=(1, 2)))
    assert half_masks[0, 3, 5] == masks[0, 7, 11] and half_masks.shape == (1, 16, 32)
    batches = Batches(train_set, 6, torch.device("cpu"), with_preset(Settings()), half_epochs=2)
    assert [next(batches.epoch(number))[0].shape[-2:] for number in (1, 2, 3)] == [(16, 32), (16, 32), (32, 64)]


def test_a_plan_is_done_once_and_goes_on_where_it_was(a_plan, processed, tmp_path, monkeypatch):
    begun, train = [], plan.train
    monkeypatch.setattr(plan, "train", lambda settings, **more: begun.append(settings) or train(settings, **more))
    out, results = tmp_path / "out", tmp_path / "out" / "results"
    summary = plan.run_plan(a_plan, processed, out, results)
    assert len(list(results.glob("*.npz"))) == 12 and not list(out.rglob("state.pt"))
    assert [s.seed for s in begun] == 10 * [0] + 10 * [1], "starts are looked at before their heirs"
    check_summary(results)
    lost = "scratch-seed1-fold1", "ce_dice-seed1-fold1"
    (results / "ce_dice-seed1-fold1.npz").unlink()
    for name in lost:
        shutil.rmtree(out / name)
    stopped = plan.run_plan(a_plan, processed, out, results, max_minutes=0)
    assert stopped["rows"]["ce_dice"]["seeds"] == [0]
    with exclusive(out / ".locks" / lost[0]):  # as where another process trains the start
        plan.run_plan(a_plan, processed, out, results, max_minutes=0.01)
    assert len(begun) == 20
    again = plan.run_plan(a_plan, processed, out, results)
    assert [s.out for s in begun[20:]] == [str(out / name) for name in lost], "the start, whose result was there, too"
    assert again["rows"]["ce_dice"]["mean"]["scores mIoU"] == summary["rows"]["ce_dice"]["mean"]["scores mIoU"]


def test_nothing_starts_from_another_training_than_the_plan_s(a_plan, processed, tmp_path, monkeypatch):
    found, job = plan.read_plan(a_plan), plan.Job("ce_dice", 0, 0)
    monkeypatch.setattr(plan.checkpoint, "unfinished", lambda about: "0 of 1 epochs")  # as where the time is up
    assert not plan.trained(found, job, processed, tmp_path, np.inf) and not (tmp_path / job.name).exists()
    monkeypatch.undo()
    assert plan.trained(found, job, processed, tmp_path, np.inf)
    found["rows"]["ce_dice"]["epochs"] = 2
    with pytest.raises(UserError, match="expected the training that the plan describes"):
        plan.trained(found, job, processed, tmp_path, np.inf)
    shutil.rmtree(tmp_path / "scratch-seed0-fold0")
    found["rows"]["scratch"]["lr"] = 1e-4
    with pytest.raises(UserError, match="expected the training that the plan describes"):
        plan.trained(found, job, processed, tmp_path, np.inf)


def check_summary(results):
    """Its numbers are means over the folds, and then over the seeds."""
    by_seed = []
    for seed in (0, 1):
        files = [np.load(results / f"ce_dice-seed{seed}-fold{fold}.npz") for fold in (0, 1)]
        facts = [json.loads(str(file["facts"])) for file in files]
        assert all(fact["recipe"]["init"]["stage"] == "scratch" for fact in facts)
        pooled = [pooled_miou(file["confusions"].sum(axis=0), "ignore") for file in files]
        assert pooled == [fact["scores"]["mIoU"] for fact in facts]
        by_seed.append(np.mean(pooled))
    row = read_json(results / "summary.json")["rows"]["ce_dice"]
    assert row["mean"]["scores mIoU"] == pytest.approx(np.mean(by_seed))
    assert row["std"]["scores mIoU"] == pytest.approx(np.std(by_seed, ddof=1)) and 0 < row["mean"]["val mIoU"] < 1
    assert row["miou_against_control"]["seeds"] == [2, 2] and "blocks" in row["miou_against_control"]["reason"]
    assert "fold 0 of 4 (at random)" in read_json(results / "summary.json")["notes"][0]


@pytest.mark.parametrize("change, said", [
    (('init = "scratch"', 'init = "later"'), "control.init, which names neither an earlier row nor a file: 'later'"),
    (("channels = 4", "chanels = 4"), "the unknown chanels"),
    (('precision = "fp32"', ""), "no 'precision'"),
    (("seeds = [0, 1]", "seeds = []"), "no rows, seeds or folds"),
    (("seeds = [0, 1]", "seeds = [1, 1]"), "(or a title) twice"),
    (("folds = [0, 1]", "folds = [0, 4]"), "fold: expected a whole number from 0 to 3"),
    (('"fp32"', '"auto"'), "or precision auto"),
    (('"CE + Dice"', '"control"'), "(or a title) twice"),
    (("channels = 4", "seed = 4"), "the unknown seed"),
    (('control = "control"', 'control = "ce_dice"'), "ce_dice.control, which names no other row"),
    (("[rows.control]", '[rows."a/b"]'), "the row 'a/b', whose name can be no file's"),
    (("[rows.control]", "[rows.control]\nchannels = 8"), "control.channels, which is not that of the network it st"),
])  # fmt: skip
def test_a_plan_with_a_mistake_is_refused_in_one_line(a_plan, change, said):
    a_plan.write_text(PLAN.replace(*change))
    with pytest.raises(UserError) as error:
        plan.read_plan(a_plan)
    assert said in str(error.value) and "\n" not in str(error.value) and str(a_plan) in str(error.value)


def test_rows_of_two_void_rules_are_refused(a_plan, monkeypatch):
    about = INHERITED | {"void": "background", "channels": 4, "depth": 2}
    monkeypatch.setattr(plan.checkpoint, "read_about", lambda path: about)
    a_plan.write_text(PLAN + f'[rows.drawn]\ninit = "{DRAWN}"\n')
    with pytest.raises(UserError, match="rows that start from weights of two void rules"):
        plan.read_plan(a_plan)


@pytest.mark.parametrize("path", sorted((ROOT / "report" / "plans").glob("*.toml")), ids=lambda path: path.stem)
def test_the_plans_of_the_repository_can_be_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = plan.read_plan(path)
    results = ROOT / "report" / "results" / found["name"]
    assert plan.read_results(found, results).keys() <= {*plan.jobs_of(found)}


DRAWN = str(ROOT / "weights" / "unet-drawn.safetensors")


@pytest.mark.parametrize("row, change, other", [
    ("control", {}, ""), ("control", {"occlusion": 0.5}, "occlusion"),
    ("control", {"init": DRAWN}, "init"), ("scratch", {"epochs": 100}, "init"),
])  # fmt: skip
def test_results_of_other_recipes_or_data_are_refused(row, change, other, tmp_path):
    found = plan.read_plan(ROOT / "report" / "plans" / "camvid7.toml")
    shutil.copy(ROOT / "report" / "results" / "camvid7" / "control-seed1-fold0.npz", tmp_path)
    found["rows"][row] |= change
    with pytest.raises(UserError, match=f"npz: was made with other {other or 'data'}; delete it"):
        plan.read_results(found, tmp_path, {0: {"trained": "", "scored": ""}} if not other else None)
    np.savez(tmp_path / "control-seed1-fold0.npz", facts="{}", confusions=0)
    with pytest.raises(UserError, match="was written by another version"):
        plan.read_results(found, tmp_path)
