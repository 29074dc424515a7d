"""The weights that come with the repository."""

import numpy as np
import pytest
from conftest import ROOT, command

from unetseg import checkpoint
from unetseg.images import read_png

WEIGHTS = ROOT / "weights"


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_they_are_small_finished_and_named_in_the_card(path):
    model, about = checkpoint.load_model(path)  # refuses what is damaged or not finite
    assert path.stat().st_size <= 16 * 2**20 and not checkpoint.unfinished(about)
    assert path.name in (WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert sum(weight.numel() for weight in model.parameters()) <= 8e6


def test_they_start_a_training(processed, tmp_path):
    more = ["--data", processed, "--out", tmp_path / "run", "--epochs", 1]
    assert command("train", "scratch", "--init", WEIGHTS / "unet-drawn.safetensors", *more) == 0
    assert checkpoint.read_history(tmp_path / "run")[-1]["val_miou"] > 0.3  # after six images


def test_they_label_a_real_street(camvid, tmp_path):
    """Four of val's frames: at least 93 of 100 pixels are right."""
    frames = sorted((camvid / "val").glob("*.png"))[::30]
    assert command("predict", WEIGHTS / "unet-camvid11.safetensors", *frames, "--out", tmp_path) == 0
    for frame in frames:
        truth = read_png(camvid / "valannot" / frame.name, "L")
        pred = read_png(tmp_path / "ids" / frame.name, "L")
        assert np.mean(pred[truth < 11] == truth[truth < 11]) > 0.93
