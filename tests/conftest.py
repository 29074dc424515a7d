"""Shared ground: a tiny drawn data set, processed, and the real data where it lies."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing"), str(ROOT / "notebooks"), str(ROOT / "report")]
os.environ.pop("WANDB_API_KEY", None)
os.environ["WANDB_MODE"] = "offline"
os.environ["TQDM_DISABLE"] = "1"

import image_segmentation_preprocessing as preprocessing
import torch

from unetseg import scenes

torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Nothing is read from or left in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Ten drawn scenes in the Cityscapes layout: six train, four val, 256x128."""
    root = tmp_path_factory.mktemp("raw scenes é")
    scenes.draw_dataset(root, {"train": 6, "val": 4}, (256, 128), seed=3)
    return root


@pytest.fixture(scope="session")
def processed(raw, tmp_path_factory):
    """The scenes above at 64x32, class set cityscapes7."""
    out = tmp_path_factory.mktemp("processed")
    command = ["--data_dir", str(raw), "--output_dir", str(out), "--size", "64x32", "--workers", "2"]
    assert preprocessing.main([*command, "--log_level", "ERROR"]) == 0
    return out


def shared(name: str) -> Path:
    """A folder of the shared real data; the test is skipped where there is none."""
    path = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data")) / name
    if not path.is_dir():
        pytest.skip(f"needs the real data in {name}: set SHARED_DATA")
    return path


@pytest.fixture
def cityscapes_sample():
    return shared("cityscapes_sample")


@pytest.fixture
def camvid():
    return shared("camvid")
