"""`python -m unetseg doctor`: states are reported, and what must change makes it fail."""

import shutil

import pytest
import torch

from unetseg import capability, doctor, stages
from unetseg.__main__ import main


@pytest.fixture
def quick(monkeypatch):
    """Without the twenty steps of the default network: a tenth of a second per image."""
    monkeypatch.setattr(stages, "seconds_per_image", lambda model, size, chosen: 0.1)
    monkeypatch.setattr(doctor, "UNet", lambda classes: torch.nn.Conv2d(3, classes, 1))


def examined(capsys, *arguments):
    status = main(["doctor", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_no_gpu_no_data_and_no_key_are_states(quick, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", "/nonexistent")
    status, said = examined(capsys)
    assert status == 0 and said.endswith("\nready\n")
    assert "none given" in said and "no key" in said and "torch " in said and "GiB free" in said
    # 100 epochs of 2975 + 250 / 3 images, then 30 and 30, at a tenth of a second
    assert (
        "scratch 8.5 h, weighted_ce 2.5 h, ce_dice 2.5 h" in said and "13.6 h, takes 2 Kaggle sessions of 12 h" in said
    )


def test_processed_data_are_described(quick, capsys, processed):
    status, said = examined(capsys, "--data", processed)
    assert status == 0 and "processed, cityscapes7 (0..6, void 255), 64x32" in said
    assert (
        "train: 6 pairs" in said and "val: 2 pairs, 2 of the 4 val images" in said and "fits a Kaggle session" in said
    )


def test_raw_data_are_described(quick, capsys, raw):
    status, said = examined(capsys, "--data", raw)
    assert status == 0 and "raw cityscapes, to be preprocessed" in said
    assert "train: 6 pairs of 256x128, ids " in said and "val: 4 pairs" in said


def test_raw_data_without_a_pair_are_the_thing_to_change(quick, capsys, raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw" / "gtFine" / "train")
    (tmp_path / "raw" / "gtFine" / "train").mkdir()
    status, said = examined(capsys, "--data", tmp_path / "raw")
    assert status == 1 and "expected pairs of image and labels in train, found none" in said


def test_raw_data_without_train_or_with_half_a_file_are_the_thing_to_change(quick, capsys, raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    picture = sorted((tmp_path / "raw" / "leftImg8bit" / "train").rglob("*.png"))[2]
    picture.write_bytes(picture.read_bytes()[:100])
    status, said = examined(capsys, "--data", tmp_path / "raw")
    assert status == 1 and f"{picture}: expected a whole PNG file" in said and "1 truncated files" in said
    for part in ("leftImg8bit", "gtFine"):
        shutil.rmtree(tmp_path / "raw" / part / "train")
    status, said = examined(capsys, "--data", tmp_path / "raw")
    assert status == 1 and "expected a split train, found val" in said


def test_settings_that_wandb_refuses_are_the_thing_to_change(quick, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offlin")
    status, said = examined(capsys)
    assert status == 1 and "to change    mend W&B's settings" in said


def test_data_that_cannot_be_used_are_the_thing_to_change(quick, capsys, processed, tmp_path):
    status, said = examined(capsys, "--data", tmp_path)
    assert status == 1 and "to change    " in said and "expected leftImg8bit/ and gtFine/" in said
    broken = tmp_path / "broken"
    shutil.copytree(processed, broken)
    next((broken / "images_processed" / "val").iterdir()).write_bytes(b"cut off")
    status, said = examined(capsys, "--data", broken)
    assert status == 1 and "cannot be used" in said and ".npy: expected the .npy array" in said
    next((broken / "masks_processed" / "train").iterdir()).unlink()
    status, said = examined(capsys, "--data", broken)
    assert status == 1 and "image without a mask" in said and not said.endswith("ready\n")


def test_a_gpu_without_kernels_is_the_thing_to_change(quick, capsys, monkeypatch):
    def refuse(index):
        raise capability.NoKernels("no code for it. What to do: T4 x2")

    facts = type("Facts", (), {"name": "P100", "major": 6, "minor": 0, "total_memory": 16 << 30})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(capability, "require_kernels", refuse)
    status, said = examined(capsys)
    assert status == 1 and "P100, sm_60, 16 GiB: cannot be used" in said and said.endswith("What to do: T4 x2\n")


def test_twenty_steps_are_measured(processed):
    model = stages.UNet(7, 4, 1)
    chosen = stages.device.Choice("fp32", "contiguous", False, "")
    assert 0 < stages.seconds_per_image(model, (32, 16), chosen) < 10
