"""`python -m unetseg doctor`: states are reported, and what must change makes it fail."""

import shutil

import pytest
import torch
from conftest import command

from unetseg import device
from unetseg.files import UserError
from unetseg.tools import doctor


@pytest.fixture
def quick(monkeypatch):
    """Without measured steps: a tenth of a second per image."""
    monkeypatch.setattr(doctor, "seconds_per_image", lambda num_classes, size: 0.1)


def examined(capsys, *arguments):
    status = command("doctor", *arguments)
    return status, capsys.readouterr().out


def test_no_gpu_no_data_and_no_key_are_states(quick, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", "/nonexistent")
    status, said = examined(capsys)
    assert status == 0 and said.endswith("\nready\n")
    assert all(text in said for text in ("none given", "no key", "torch ", "GiB free", "precision "))
    # 75 epochs of 2975 / 4 + 250 / 3 images and 25 of 2975 + 250 / 3, then 30 and 30, at a tenth of a second
    assert "scratch 3.8 h, weighted_ce 2.5 h, ce_dice 2.5 h" in said and "all three: 8.9 h\n" in said


def test_sessions_are_counted_on_kaggle(quick, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "KAGGLE", tmp_path)
    assert "1 of Kaggle's sessions of 12 h" in examined(capsys)[1]


def test_processed_data_are_described(quick, capsys, processed):
    status, said = examined(capsys, "--data", processed)
    assert status == 0 and "processed, cityscapes7 (0..6, void 255), 64x32" in said
    assert "train: 6 pairs" in said and "val: 2 pairs, 2 of the 4 val images" in said and "Kaggle" not in said


def test_raw_data_are_described(quick, capsys, raw):
    status, said = examined(capsys, "--data", raw)
    assert status == 0 and "raw cityscapes, to be preprocessed" in said
    assert "train: 6 pairs of 256x128, ids " in said and "val: 4 pairs" in said


def spoil_labels(root):
    shutil.rmtree(root / "gtFine" / "train")
    (root / "gtFine" / "train").mkdir()


def spoil_picture(root):
    picture = sorted((root / "leftImg8bit" / "train").rglob("*.png"))[2]
    picture.write_bytes(picture.read_bytes()[:100])


@pytest.mark.parametrize("spoil, expected", [
    (spoil_labels, "expected pairs of image and labels in train, found none"),
    (spoil_picture, "expected a complete file (1 are truncated)"),
])  # fmt: skip
def test_spoiled_raw_data_are_the_thing_to_change(quick, capsys, raw, tmp_path, spoil, expected):
    shutil.copytree(raw, tmp_path / "raw")
    spoil(tmp_path / "raw")
    status, said = examined(capsys, "--data", tmp_path / "raw")
    assert status == 1 and expected in said and "to change    " in said


def test_data_that_cannot_be_used_are_the_thing_to_change(quick, capsys, processed, tmp_path):
    status, said = examined(capsys, "--data", tmp_path)
    assert status == 1 and "expected leftImg8bit/ and gtFine/" in said
    broken = shutil.copytree(processed, tmp_path / "broken")
    next((broken / "images_processed" / "val").iterdir()).unlink()
    next((broken / "masks_processed" / "train").iterdir()).write_bytes(b"cut off")
    status, said = examined(capsys, "--data", broken)
    assert status == 1 and "rerun preprocessing" in said and not said.endswith("ready\n")


def test_settings_that_wandb_refuses_are_the_thing_to_change(quick, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offlin")
    status, said = examined(capsys)
    assert status == 1 and "to change    W&B cannot be used" in said


def test_a_gpu_without_kernels_is_the_thing_to_change(quick, capsys, monkeypatch):
    def refuse(index):
        raise UserError("P100 (sm_60) cannot be used. What to do: T4 x2")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(device, "require_kernels", refuse)
    status, said = examined(capsys)
    assert status == 1 and said.endswith("What to do: T4 x2\n")


def test_steps_are_measured():
    assert 0 < doctor.seconds_per_image(7, (32, 16), channels=2) < 10
    assert [doctor.duration(hours) for hours in (2, 0.5)] == ["2.0 h", "30.0 min"]
