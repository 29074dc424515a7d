"""The weights that come with the repository."""

import numpy as np
import pytest
from conftest import ROOT, command

from unetseg import checkpoint
from unetseg.classes import CLASS_SETS, IGNORE_INDEX
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


@pytest.mark.parametrize("name", ["camvid11", "camvid7"])
def test_they_label_a_real_street(camvid, tmp_path, name):
    """Four of val's frames: at least 93 of 100 pixels are right."""
    frames, class_set = sorted((camvid / "val").glob("*.png"))[::30], CLASS_SETS[name]
    assert command("predict", WEIGHTS / f"unet-{name}.safetensors", *frames, "--out", tmp_path) == 0
    for frame in frames:
        truth = class_set.lookup[read_png(camvid / "valannot" / frame.name, "L")]
        pred, valid = read_png(tmp_path / "ids" / frame.name, "L"), truth != IGNORE_INDEX
        assert np.mean(pred[valid] == truth[valid]) > 0.93
