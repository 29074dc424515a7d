"""The commands, as a user gives them, on a tiny data set."""

import json
import re
import shutil

import image_segmentation_preprocessing as preprocessing
import numpy as np
import pytest
import torch
from PIL import Image

from unetseg import device, stages
from unetseg.__main__ import main
from unetseg.checkpoint import load_state, load_weights, read_history
from unetseg.session import Session

TINY = ["--channels", "4", "--depth", "2", "--epochs", "2", "--batch-size", "4", "--precision", "fp32"]


def command(*parts):
    return main([str(part) for part in parts])


@pytest.fixture(scope="module")
def home(processed, tmp_path_factory):
    """All three stages, trained for two epochs."""
    home = tmp_path_factory.mktemp("home")
    data = ["--data", processed]
    assert command("train", "scratch", *data, "--out", home / "scratch", *TINY) == 0
    for stage in ("weighted_ce", "ce_dice"):
        options = ["--init", home / "scratch", "--epochs", "2", "--precision", "fp32"]
        assert command("train", stage, *data, "--out", home / stage, *options) == 0
    return home


def test_each_run_folder_is_complete(home):
    for stage in stages.STAGES:
        names = {path.name for path in (home / stage).iterdir()}
        assert names >= {"model.safetensors", "config.json", "history.csv", "state.pt", "wandb"}
        metadata = load_weights(home / stage)[1]
        assert (metadata["stage"], metadata["class_set"], metadata["void"]) == (stage, "cityscapes7", "ignore")
        assert (metadata["channels"], metadata["depth"], metadata["width"], metadata["height"]) == (
            "4",
            "2",
            "64",
            "32",
        )


def test_fine_tunings_start_from_the_best_of_scratch(home):
    fingerprint = stages.fingerprint(str(home / "scratch"))
    for stage in ("weighted_ce", "ce_dice"):
        assert json.loads((home / stage / "config.json").read_text())["init_sha256"] == fingerprint


def test_evaluate_scores_both_rules_and_writes_them(home, processed, capsys):
    assert command("evaluate", home / "scratch", "--data", processed) == 0
    said = capsys.readouterr().out
    assert "void=ignore (trained under this rule)" in said and "void=background:" in said and "(test), 64x32" in said
    results = json.loads((home / "scratch" / "results_test.json").read_text())
    assert results["num_images"] == 2 and np.sum(results["confusion"]) == 2 * 64 * 32
    assert set(results["rules"]) == {"ignore", "background"}


def test_the_same_command_again_changes_nothing(home, processed):
    before = {path.name: path.read_bytes() for path in (home / "scratch").iterdir() if path.is_file()}
    assert command("train", "scratch", "--data", processed, "--out", home / "scratch", *TINY) == 0
    assert {name: (home / "scratch" / name).read_bytes() for name in before} == before


def test_a_run_folder_of_other_settings_is_refused(home, processed, capsys):
    assert command("train", "scratch", "--data", processed, "--out", home / "scratch", *TINY, "--lr", "0.5") == 1
    assert re.search(r"begun with other settings.*\n.*lr: 0.003 there, 0.5 now", capsys.readouterr().err)


@pytest.mark.parametrize("options, message", [
    (["weighted_ce", "--init", "SCRATCH", "--dice-share", "2"], "expected a share in [0, 1], found 2.0"),
    (["ce_dice", "--init", "nowhere"], "expected trained weights, found nothing"),
    (["scratch", "--void", "background", "--data", "nowhere"], "run preprocessing"),
    (["ce_dice", "--init", "SCRATCH", "--channels", "8"], "expected channels 8, found 4"),
    (["scratch", "--lr", "inf"], "lr: expected more than 0, found inf"),
    (["scratch", "--seed", "99999999999"], "seed: expected 0 or more"),
    (["scratch", "--channels", "5000"], "channels: expected 1 to 1024"),
    (["scratch", "--max-minutes", "nan"], "max_minutes: expected more than 0, found nan"),
    (["scratch", "--epochs", "0"], "epochs: expected more than 0, found 0"),
    (["weighted_ce"], "give the run or weights it starts from"),
    (["ce_dice", "--init", "SCRATCH", "--aim-at", "dragon"], "found dragon"),
])  # fmt: skip
def test_wrong_settings_say_what_was_expected(options, message, home, processed, tmp_path, capsys):
    options = [str(home / "scratch") if option == "SCRATCH" else option for option in options]
    stage, *rest = options
    assert command("train", stage, "--data", processed, "--out", tmp_path / "run", *rest) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_usage_errors_exit_with_2(processed, tmp_path):
    assert command("train", "weighted_ce", "--data", processed, "--out", tmp_path) == 2


def test_a_fine_tuning_out_of_time_ends_as_the_uninterrupted_one(home, processed, tmp_path, monkeypatch):
    looks = []

    def over(session, reserve):
        looks.append(0)
        return "the time is up" if len(looks) % 3 == 0 else ""

    tune = ["train", "ce_dice", "--data", processed, "--init", home / "scratch", "--epochs", "3", "--batch-size", "2"]
    tune += ["--precision", "bf16", "--occlusion", "1"]
    assert command(*tune, "--out", tmp_path / "whole") == 0
    monkeypatch.setattr(Session, "over", over)
    sessions = 0
    while len(read_history(tmp_path / "parts")) < 3:
        assert command(*tune, "--out", tmp_path / "parts", "--max-minutes", 10 + sessions) == 0
        sessions += 1
    whole, parts = (load_state(tmp_path / name)["trainer"] for name in ("whole", "parts"))
    assert sessions > 4 and whole["steps"] == parts["steps"] == 9
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])


def test_a_run_on_other_data_or_weights_is_refused(home, processed, tmp_path, capsys):
    shutil.copytree(home, tmp_path / "home")
    shutil.copytree(processed, tmp_path / "data")
    same = ["--data", tmp_path / "data", "--init", tmp_path / "home" / "scratch"]
    tune = ["train", "ce_dice", *same, "--out", tmp_path / "home" / "ce_dice", "--epochs", "2", "--precision", "fp32"]
    assert command(*tune) == 0  # the same data and weights in another place
    shutil.copy(home / "weighted_ce" / "model.safetensors", tmp_path / "home" / "scratch")
    for path in (tmp_path / "data").glob("masks_processed/train/*.png"):
        Image.fromarray(np.array(Image.open(path))).save(path)  # without the note that holds the image's checksum
    image = next((tmp_path / "data").glob("images_processed/train/*.npy"))
    np.save(image, 1 - np.load(image))
    assert command(*tune) == 1
    said = capsys.readouterr().err
    assert "init_sha256: " in said and "data_sha256: " in said


def test_a_run_whose_best_weights_are_gone_is_refused(home, processed, tmp_path, capsys):
    shutil.copytree(home / "scratch", tmp_path / "scratch")
    (tmp_path / "scratch" / "model.safetensors").unlink()
    assert command("train", "scratch", "--data", processed, "--out", tmp_path / "scratch", *TINY) == 1
    assert "expected the best weights so far, model.safetensors, found none" in capsys.readouterr().err


def test_train_and_val_of_different_sizes_are_refused(processed, raw, tmp_path, capsys):
    shutil.copytree(processed, tmp_path / "data")
    options = ["--size", "32", "--splits", "train", "--log_level", "ERROR"]
    assert preprocessing.main(["--data_dir", str(raw), "--output_dir", str(tmp_path / "data"), *options]) == 0
    assert command("train", "scratch", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY) == 1
    assert "expected train and val alike" in capsys.readouterr().err


def test_a_fine_tuning_inherits_width_depth_and_void_rule(home, processed, tmp_path):
    assert command("train", "scratch", "--data", processed, "--out", tmp_path / "b", *TINY, "--void", "background") == 0
    settings = stages.resolve(stages.Settings("ce_dice", str(processed), "out", init=str(tmp_path / "b")))
    assert (settings.channels, settings.depth, settings.void) == (4, 2, "background")
    assert stages.resolve(stages.Settings("scratch", "d", "o")).channels == 32


def test_predict_writes_ids_colours_and_overlays_at_the_inputs_size(home, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "in put" / "deep").mkdir(parents=True)
    for name, size in (("a.png", (70, 90)), ("deep/straße.jpg", (33, 41))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "in put" / name)
    (tmp_path / "in put" / "broken.png").write_bytes(b"no image")
    assert command("predict", home / "scratch", tmp_path / "in put", "--out", tmp_path / "out") == 1
    assert "broken.png: expected a readable image" in capsys.readouterr().err
    for stem, size in (("a", (90, 70)), ("straße", (41, 33))):
        ids = Image.open(tmp_path / "out" / "ids" / f"{stem}.png")
        assert ids.mode == "L" and ids.size == size and np.max(ids) < 7
        for folder in ("colour", "overlay"):
            picture = Image.open(tmp_path / "out" / folder / f"{stem}.png")
            assert picture.mode == "RGB" and picture.size == size


def test_predict_takes_a_weights_file_and_refuses_nothing_found(home, tmp_path, capsys):
    weights = home / "scratch" / "model.safetensors"
    assert command("predict", weights, tmp_path / "nowhere.png", "--out", tmp_path / "out") == 1
    assert "nowhere.png: expected an image or a folder of images" in capsys.readouterr().err


def test_scenes_command(tmp_path):
    assert command("scenes", tmp_path / "s", "--train", 1, "--val", 1, "--size", "128x64") == 0
    assert Image.open(next((tmp_path / "s").glob("gtFine/train/drawn/*_labelIds.png"))).size == (128, 64)


def test_where_it_computes_is_said(processed, tmp_path, capsys, monkeypatch):
    """A forgotten accelerator should be seen at the first line, not after hours."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert command("train", "scratch", "--data", processed, "--out", tmp_path / "run", *TINY) == 0
    assert f"run on {device.device_name(torch.device('cpu'))}: fp32, " in capsys.readouterr().err
