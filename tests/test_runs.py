"""The commands, as a user gives them, and run folders spoiled as users do it: what a folder says stays true."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import ROOT, command, process, without_timings
from PIL import Image

import unetseg
from unetseg import checkpoint, evaluation, run
from unetseg.files import UserError, read_json, write_json
from unetseg.model import MODELS
from unetseg.settings import PRESETS, TITLES, Settings
from unetseg.train import Stopper

TINY = ["--channels", 4, "--depth", 2, "--epochs", 2, "--batch-size", 4, "--precision", "fp32"]


@pytest.fixture
def home(made, tmp_path):
    """A copy of the three runs that may be spoiled."""
    return shutil.copytree(made, tmp_path / "home")


def train(home, processed, *more, stage="scratch", out=None):
    return command("train", stage, "--data", processed, "--out", out or home / stage, *TINY, *more)


def config(run_folder):
    return read_json(run_folder / "config.json")


def edit(run_folder, **changes):
    write_json(run_folder / "config.json", config(run_folder) | changes)


# ---- the commands


def test_each_run_folder_is_complete_and_says_what_it_is(made):
    for stage in TITLES:
        names = {path.name for path in (made / stage).iterdir()}
        assert names >= {"model.safetensors", "config.json", "history.csv", "state.pt"}
        about = checkpoint.read_about(made / stage)
        facts = {"stage": stage, "class_set": "cityscapes7", "void": "ignore", "channels": 4, "width": 64, "height": 32}
        assert facts.items() <= about.items()
        parent = checkpoint.weights_sha256(made / "scratch") if stage != "scratch" else None
        assert config(made / stage)["init_sha256"] == parent
        assert config(made / stage)["settings"]["loss"] == PRESETS[stage]["loss"]


def test_evaluate_scores_both_rules_and_writes_them(made, processed, capsys):
    assert command("evaluate", made / "scratch", "--data", processed) == 0
    said = capsys.readouterr().out
    for part in ("void=ignore (trained under this rule): mIoU", "void=background:", "(test), 64x32"):
        assert part in said
    results = evaluation.read_results(made / "scratch")
    assert results["num_images"] == 2 and np.sum(results["confusion"]) == 2 * 64 * 32
    assert set(results["rules"]) == {"ignore", "background"}
    assert " ".join(results["remarks"]).count(": too few to read anything into the scores") == 2


def test_the_same_command_again_changes_nothing(home, processed):
    before = {path.name: path.read_bytes() for path in (home / "scratch").iterdir() if path.is_file()}
    assert train(home, processed) == 0
    assert {name: (home / "scratch" / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("options, message", [
    (["weighted_ce", "--init", "SCRATCH", "--dice-share", "2"], "dice_share: expected a number from 0 to 1; found 2.0"),
    (["ce_dice", "--init", "nowhere"], "expected trained weights, found nothing"),
    (["scratch", "--void", "background", "--data", "nowhere"], "Run preprocessing first"),
    (["ce_dice", "--init", "SCRATCH", "--channels", "8"], "channels: expected 4 as in"),
])  # fmt: skip
def test_wrong_settings_say_what_was_expected(options, message, made, processed, tmp_path, capsys):
    stage, *rest = [str(made / "scratch") if option == "SCRATCH" else option for option in options]
    assert command("train", stage, "--data", processed, "--out", tmp_path / "run", *rest) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_typo_in_a_first_start_does_not_spoil_the_folder(processed, tmp_path, capsys):
    assert train(tmp_path, processed, "--aim-at", "dragon") == 2
    assert train(tmp_path, processed) == 0
    assert len(checkpoint.read_history(tmp_path / "scratch")) == 2


def test_a_fine_tuning_inherits_width_depth_and_void_rule(processed, tmp_path):
    assert train(tmp_path, processed, "--void", "background") == 0
    settings = run.resolve(Settings("ce_dice", str(processed), "out", init=tmp_path / "scratch"))
    assert (settings.channels, settings.depth, settings.void, settings.lr) == (4, 2, "background", 1e-3)
    assert run.resolve(Settings()).channels == 32


def foreign(num_classes, channels):
    """A network that is not ours: two convolutions and a batch normalisation."""
    layers = torch.nn.Conv2d(3, channels, 3, padding=1), torch.nn.BatchNorm2d(channels), torch.nn.ReLU()
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(channels, num_classes, 1))


def test_a_foreign_network_trains_resumes_is_scored_and_predicts(processed, tmp_path, monkeypatch):
    """One line in model.py does it."""
    monkeypatch.setitem(MODELS, "foreign", foreign)
    settings = Settings("scratch", processed, tmp_path / "run", model="foreign", channels=5, epochs=2, batch_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(Stopper, "reason", lambda self, reserve: "test")
        run.train(settings, log=print)
    history = run.train(settings, log=print)
    whole = run.train(Settings(**vars(settings) | {"out": str(tmp_path / "whole")}), log=print)
    assert without_timings(history) == without_timings(whole)
    assert evaluation.evaluate_run(tmp_path / "run", processed)["num_images"] == 2
    Image.new("RGB", (70, 50)).save(tmp_path / "a.png")
    assert command("predict", tmp_path / "run", tmp_path / "a.png", "--out", tmp_path / "out") == 0
    tuned = Settings("ce_dice", processed, tmp_path / "tuned", init=tmp_path / "run", epochs=1, batch_size=4)
    assert run.resolve(tuned).model == "foreign" and len(run.train(tuned, log=print)) == 1


# ---- what a run folder says is true


def test_a_folder_of_other_settings_is_refused_with_the_difference(home, processed, capsys):
    assert train(home, processed, "--lr", "0.5") == 1
    said = capsys.readouterr().err
    assert re.search(r"belongs to a run with other settings; use another --out.*\n.*lr: 0.003 there, 0.5 here", said)


def test_more_epochs_for_a_finished_run_are_a_second_cycle(home, processed, capsys):
    assert train(home, processed, "--epochs", "4") == 0
    rows = checkpoint.read_history(home / "scratch")
    assert [row["cycle"] for row in rows] == [1, 1, 2, 2] and config(home / "scratch")["cycles"] == [2, 4]
    assert [rows[2]["lr"], rows[3]["lr"]] == pytest.approx([rows[0]["lr"], rows[1]["lr"]])
    assert checkpoint.read_about(home / "scratch")["epoch"] in (1, 2, 3, 4)
    assert train(home, processed, "--epochs", "2") == 1
    assert "epochs: 4 there, 2 here (a finished run can be given more)" in capsys.readouterr().err


def test_more_epochs_resume_as_if_never_interrupted(home, processed, monkeypatch):
    shutil.copytree(home / "scratch", home / "whole")
    assert train(home, processed, "--epochs", "4", out=home / "whole") == 0
    with monkeypatch.context() as patch:
        looks = []
        patch.setattr(Stopper, "reason", lambda self, reserve: looks.append(0) or "test" * (len(looks) == 4))
        assert train(home, processed, "--epochs", "4") == 0
    assert len(checkpoint.read_history(home / "scratch")) == 3
    assert train(home, processed, "--epochs", "4") == 0
    weights = [(home / name / "model.safetensors").read_bytes() for name in ("scratch", "whole")]
    assert weights[0] == weights[1]


def test_an_unfinished_run_cannot_be_given_more_epochs(processed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Stopper, "reason", lambda self, reserve: "test")
    assert train(tmp_path, processed) == 0
    assert train(tmp_path, processed, "--epochs", "9") == 1
    assert "epochs: 2 there, 9 here" in capsys.readouterr().err


def test_other_data_or_initial_weights_are_refused(home, raw, processed, tmp_path, capsys):
    assert process(raw, tmp_path / "small", "--size", "32") == 0
    assert train(home, tmp_path / "small") == 1
    assert "train_sha256: " in capsys.readouterr().err
    tune = ["--init", home / "weighted_ce", "--epochs", "2", "--precision", "fp32"]
    assert command("train", "ce_dice", "--data", processed, "--out", home / "ce_dice", *tune) == 1
    assert "init_sha256: " in capsys.readouterr().err


def test_a_starting_run_that_trains_on_is_said(home, processed, capsys):
    assert train(home, processed, "--epochs", "6", "--lr", "0.003") == 0
    edit(home / "ce_dice", settings=config(home / "ce_dice")["settings"] | {"init": str(home / "scratch")})
    tune = ["--init", home / "scratch", "--epochs", "3", "--precision", "fp32"]
    assert command("train", "ce_dice", "--data", processed, "--out", home / "ce_dice", *tune) == 0
    assert "has changed since this run began, which goes on from its own" in capsys.readouterr().err


def test_an_unfinished_start_and_another_void_rule_are_said(home, processed, capsys):
    code = "from unetseg import __main__, train; train.Stopper.reason = lambda self, reserve=0: 'the test stops'"
    parts = ["train", "scratch", "--data", processed, "--out", home / "begun", "--channels", "4", "--depth", "2"]
    stopped = [sys.executable, "-c", f"{code}; __main__.main({[str(part) for part in parts]})"]
    assert subprocess.run(stopped, env=os.environ | {"WANDB_MODE": "disabled"}, cwd=ROOT).returncode == 0
    tune = ["--epochs", "1", "--void", "background", "--data", processed, "--out", home / "new"]
    assert command("train", "ce_dice", "--init", home / "begun", *tune) == 1
    weights = home / "begun" / "model.safetensors"
    advice = f"finish it, or start from its present weights by --init {weights}"
    assert f"expected a finished run, found 0 of 100 epochs; {advice}" in capsys.readouterr().err
    assert command("train", "ce_dice", "--init", weights, *tune) == 0
    said = capsys.readouterr().err
    assert "has 0 of 100 epochs; its present weights are used" in said
    assert "was trained under void=ignore, not background" in said


def test_weights_of_another_run_are_not_scored_as_this_ones(home, processed, capsys):
    shutil.copy(home / "weighted_ce" / "model.safetensors", home / "scratch")
    assert command("evaluate", home / "scratch", "--data", processed) == 1
    said = capsys.readouterr().err
    assert "model.safetensors: these weights are from another run than config.json" in said
    assert "stage: 'weighted_ce' there, 'scratch' here" in said


def test_scores_of_weights_since_changed_are_refused(home, processed, capsys):
    assert command("evaluate", home / "scratch", "--data", processed) == 0
    weights = home / "scratch" / "model.safetensors"
    with safetensors.safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(weights)
    tensors["head.bias"] += 1
    safetensors.torch.save_file(tensors, weights, metadata)
    with pytest.raises(UserError, match=r"these are scores of other weights than .* holds; run `evaluate` again"):
        evaluation.read_results(home / "scratch")


def test_runs_scored_on_different_images_are_not_compared(home, processed):
    (home / "scratch" / "results_test.json").unlink(missing_ok=True)
    evaluation.evaluate_run(home / "scratch", processed, "val")
    evaluation.evaluate_run(home / "ce_dice", processed, "test")
    with pytest.raises(UserError, match="expected runs with the same split, found scratch: val, ce_dice: test"):
        evaluation.comparison_table([home / "scratch", home / "ce_dice"])
    (home / "scratch" / "results_val.json").unlink()
    evaluation.evaluate_run(home / "scratch", processed, "test")
    assert "(+0.0)" in evaluation.comparison_table([home / "scratch", home / "scratch"])


def test_val_that_has_grown_puts_no_seen_image_into_test_in_silence(home, raw, processed, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    for path in sorted((tmp_path / "raw").rglob("*/val/*/*.png"))[:8]:
        path.with_name(path.name.replace("000003", "000009")).write_bytes(path.read_bytes())
    assert process(tmp_path / "raw", tmp_path / "grown", "--size", "64x32") == 0
    results = evaluation.evaluate_run(home / "scratch", tmp_path / "grown")
    assert any("were in the run's train or val split: they are not unseen" in remark for remark in results["remarks"])
    assert any("does not hold the data that the run was trained on" in remark for remark in results["remarks"])
    assert "not unseen" in evaluation.results_table(results)


def test_a_run_on_changed_code_names_every_commit(home, processed, monkeypatch):
    monkeypatch.setattr(run, "commit", lambda: "abc-dirty")
    assert train(home, processed, "--epochs", "3") == 0
    results = evaluation.evaluate_run(home / "scratch", processed)
    assert len(results["commit"].split(" / ")) == 2 and results["commit"].endswith("abc-dirty")


def test_the_commit_is_that_of_this_code_whatever_git_is_told(tmp_path, monkeypatch):
    here = run.commit()
    subprocess.run(["git", "init", "-q", tmp_path / "other"], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert run.commit() == here
    site = tmp_path / "other" / "venv" / "unetseg"  # installed inside somebody else's repository
    site.mkdir(parents=True)
    (site / "__init__.py").touch()
    monkeypatch.setattr(unetseg, "__file__", str(site / "__init__.py"))
    assert run.commit() == "unknown"


def test_a_new_setting_or_column_strands_no_older_run(home, processed, monkeypatch):
    stored = config(home / "scratch")
    edit(home / "scratch", settings={key: value for key, value in stored["settings"].items() if key != "occluder_size"})
    state = torch.load(home / "scratch" / "state.pt", weights_only=True)
    state["history"] = [{key: row[key] for key in row if key != "val_accuracy"} for row in state["history"]]
    del state["identity"]["occluder_size"]
    torch.save(state, home / "scratch" / "state.pt")
    assert train(home, processed, "--epochs", "3") == 0
    rows = checkpoint.read_history(home / "scratch")
    assert rows[0]["val_accuracy"] is None and rows[2]["val_accuracy"] > 0


def test_a_state_that_is_gone_and_a_folder_without_config_are_told(home, processed, capsys):
    (home / "scratch" / "state.pt").unlink()
    assert train(home, processed) == 0  # it was finished
    edit(home / "scratch", cycles=[2, 9])
    assert train(home, processed, "--epochs", "9") == 1
    assert "state.pt is gone, so this run cannot resume; start another one with --init" in capsys.readouterr().err
    (home / "scratch" / "config.json").unlink()
    assert train(home, processed) == 1
    assert "holds model.safetensors of an unknown run; use another --out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1}'])
def test_a_spoiled_config_is_named(home, processed, capsys, text):
    (home / "scratch" / "config.json").write_text(text)
    assert train(home, processed) == 1 and command("evaluate", home / "scratch", "--data", processed) == 1
    said = capsys.readouterr().err
    assert str(home / "scratch") in said and "Traceback" not in said


def test_train_and_val_processed_differently_are_refused(processed, raw, tmp_path, capsys):
    stats = shutil.copytree(processed, tmp_path / "data") / "stats_train.json"
    stats.write_text(re.sub('"sources": "....', '"sources": "', stats.read_text()))
    assert train(tmp_path, tmp_path / "data") == 1
    assert process(raw, tmp_path / "data", "--size", "32", "--splits", "train") == 0
    assert train(tmp_path, tmp_path / "data") == 1
    assert capsys.readouterr().err.count("train and val have different class sets, ids or sizes") == 2


def test_variables_left_by_a_launcher_change_nothing(processed, tmp_path):
    left = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    tiny = ["--channels", "4", "--depth", "2", "--epochs", "1"]
    parts = [sys.executable, "-m", "unetseg", "train", "scratch", "--data", processed, "--out", tmp_path / "run", *tiny]
    done = subprocess.run(parts, env=os.environ | left, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 and "val mIoU" in done.stdout, done.stderr


def test_a_finished_run_on_a_read_only_place_is_used_as_it_is(home, processed, monkeypatch, capsys):
    def read_only(*args, **more):
        raise UserError("run: Read-only file system")

    for place in ("run.exclusive", "run.write_json", "evaluation.results.write_json"):
        monkeypatch.setattr(f"unetseg.{place}", read_only)
    assert train(home, processed) == 0
    assert command("evaluate", home / "scratch", "--data", processed) == 0
    assert "pixel" not in capsys.readouterr().err


def test_each_trial_of_the_sweep_trains_in_a_folder_of_its_own(processed, tmp_path, monkeypatch):
    sweep = yaml.safe_load((ROOT / "report" / "plans" / "sweep.yaml").read_text())
    line = [{"processed": processed, "runs/sweep": tmp_path}.get(part, part) for part in sweep["command"][4:-1]]
    values = {name: one.get("values", [one.get("value", one.get("min"))]) for name, one in sweep["parameters"].items()}
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    for trial, place in (("a", 0), ("b", -1)):
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        flags = [f"--{name}={found[place]}" for name, found in values.items()]
        assert command(*line, *flags, "--epochs=1", "--channels=4", "--depth=1") == 0
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"a", "b"}
    monkeypatch.delenv("WANDB_RUN_ID")  # somebody's shell
    assert command(*line, *flags, "--epochs=1", "--channels=4") == 0 and (tmp_path / "config.json").is_file()
    assert checkpoint.read_config(tmp_path / "b")["settings"]["loss"] == "ce_dice"
