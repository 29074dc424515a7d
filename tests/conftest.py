"""Shared ground: a tiny drawn data set, processed, and the real data where it lies."""

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "report"), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that tests start
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]
os.environ["WANDB_MODE"] = "disabled"
os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # as many files are tested at once as there are cores

import torch

from unetseg.__main__ import main
from unetseg.tools import preprocess, scenes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def alone():
    """Notebooks look for /kaggle, which test_kaggle.py makes: one module of both at a time."""
    with FileLock(Path(tempfile.gettempdir()) / "unetseg-tests.lock"):
        yield


def command(*parts):
    """`python -m unetseg` with these arguments, in this process; returns the exit status."""
    return main([str(part) for part in parts])


def process(raw, out, *options):
    """Preprocess with a thread in place of worker processes, which take seconds to start; returns the exit status."""
    parts = ["--data_dir", raw, "--output_dir", out, "--workers", 1, "--log_level", "ERROR", "--sample_size", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "worker_pool", ThreadPoolExecutor)
        return preprocess.main([str(part) for part in (*parts, *options)])


def wait_for(path, process):
    """Wait until the process has written a file."""
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def tree(folder, but=(".lock",)):
    """Name -> content of every file under a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def same(a, b):
    """Whether two states are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)


def without_timings(history):
    timings = ("seconds", "images_per_second", "gpu_gibibytes")
    return [{key: row[key] for key in row if key not in timings} for row in history]


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
    assert process(raw, out, "--size", "64x32") == 0
    return out


@pytest.fixture(scope="session")
def made(processed, tmp_path_factory):
    """What a main job leaves, at a tiny size: data, and the three stages, trained for two epochs and scored."""
    home = tmp_path_factory.mktemp("homes") / "tiny"
    shutil.copytree(processed, home / "processed")
    for stage in ("scratch", "weighted_ce", "ce_dice"):
        first = stage == "scratch"
        more = ["--channels", 4, "--depth", 2, "--batch-size", 4] if first else ["--init", home / "scratch"]
        options = ["--data", processed, "--out", home / stage, "--epochs", 2, "--precision", "fp32"]
        assert command("train", stage, *options, *more) == 0
        assert command("evaluate", home / stage, "--data", processed) == 0
    return home


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
