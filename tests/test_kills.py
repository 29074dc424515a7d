"""Killed anywhere and started again, training and preprocessing end as if nothing had been."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import image_segmentation_preprocessing as preprocessing
import pytest
import torch

from unetseg import checkpoint
from unetseg.files import atomic_open, exclusive, write_json

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "preprocessing" / "image_segmentation_preprocessing.py"
# The command line, killed at the given call of a function: while a file is written, in a step, in evaluation ...
DYING = """
import os, signal, sys
from unetseg import __main__, engine, trainer
engine.SAVE_SECONDS = 0
owner, name, count = eval(sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))
function = getattr(owner, name)
def dying(*args, **more):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **more)
setattr(owner, name, dying)
sys.exit(__main__.main())
"""


def start(*command, **options):
    environment = os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes, **options)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def train(processed, tmp_path):
    """The command that trains into tmp_path/<name>."""
    options = ["--channels", 4, "--depth", 2, "--epochs", 3, "--batch-size", 2, "--precision", "bf16"]
    return lambda name: ["train", "scratch", "--data", processed, *options, "--out", tmp_path / name]


def test_a_training_killed_anywhere_ends_as_if_nothing_had_been(train, tmp_path):
    places = [("os", "fsync", 3), ("os", "replace", 4), ("engine", "confusion_matrix", 1), ("os", "fsync", 1)]
    places += [("trainer.Trainer", "step", 3), ("engine.checkpoint", "write_history", 2)]
    assert start("-m", "unetseg", *train("whole")).wait() == 0
    for owner, name, count in places:
        killed = start("-c", DYING, owner, name, count, *train("parts"))
        assert killed.wait() == -signal.SIGKILL, (name, killed.stderr.read())
    assert start("-m", "unetseg", *train("parts")).wait() == 0
    whole, parts = (checkpoint.load_state(tmp_path / name) for name in ("whole", "parts"))
    timings = ("seconds", "images_per_second")
    for state in (whole, parts):
        state["position"]["history"] = [
            {key: row[key] for key in row if key not in timings} for row in state["position"]["history"]
        ]
    assert same(whole["trainer"], parts["trainer"]) and same(whole["position"], parts["position"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1] and len(checkpoint.read_history(tmp_path / "parts")) == 3
    assert not list((tmp_path / "parts").glob("*.tmp")) + list((tmp_path / "parts").glob(".*.tmp"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_gives_its_exit_status(train, tmp_path, number, status):
    process = start("-m", "unetseg", *train("run"), "--epochs", 5000)
    while not (tmp_path / "run" / "model.safetensors").is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err, err
    assert f"stopped ({number.name}) in epoch" in err and "the same again goes on from here" in err
    assert checkpoint.load_state(tmp_path / "run")["position"]["history"]


def test_out_of_time_ends_with_status_0_in_time(train, tmp_path):
    began = time.monotonic()
    process = start("-m", "unetseg", *train("run"), "--epochs", 100_000, "--max-minutes", 0.3)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped (the time is up) in epoch" in err, out
    assert time.monotonic() - began < 18 + 6  # 6 seconds for Python itself to start and end
    assert checkpoint.load_state(tmp_path / "run")


def test_two_trainings_do_not_share_a_folder(train, tmp_path):
    with exclusive(tmp_path / "run"):
        process = start("-m", "unetseg", *train("run"))
        assert process.wait() == 1
        assert "expected to be alone, found another process at work in it" in process.stderr.read()


def test_no_secret_is_printed_or_stored(train, tmp_path, monkeypatch):
    secrets = {
        "WANDB_API_KEY": "5ec7e7" * 6 + "0000",
        "KAGGLE_KEY": "4a66" * 8,
        "KAGGLE_USER_SECRETS_TOKEN": "e1f4" * 9,
    }
    environment = os.environ | secrets | {"WANDB_BASE_URL": "http://127.0.0.1:1", "PYTHONPATH": str(ROOT)}
    environment.pop("WANDB_MODE")
    command = [sys.executable, "-m", "unetseg", *map(str, train("run"))]
    done = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0 and b"127.0.0.1 does not answer; logging offline" in done.stderr
    files = tree(tmp_path)
    assert any(name.endswith(".wandb") for name in files)
    for secret in secrets.values():
        assert secret.encode() not in done.stdout + done.stderr
        assert not [name for name, content in files.items() if secret.encode() in content]


# ---- preprocessing


def preprocess(raw, out, *options):
    return [SCRIPT, "--data_dir", raw, "--output_dir", out, "--size", "64", "--workers", 2, *options]


def test_a_preprocessing_killed_anywhere_ends_as_if_nothing_had_been(raw, tmp_path):
    before = tree(raw)
    assert start(*preprocess(raw, tmp_path / "whole")).wait() == 0
    for enough in (1, 4, 9, 10):  # images there when the kill comes; the workers must notice by themselves
        process = start(*preprocess(raw, tmp_path / "parts"))
        while process.poll() is None and len(list((tmp_path / "parts").rglob("*.npy"))) < enough:
            time.sleep(0.001)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        for path in (tmp_path / "parts").rglob("*.npy"):
            assert len(path.read_bytes()) == 64 * 64 * 3 * 4 + 128
        (tmp_path / "parts/images_processed/train" / f".left.npy.{process.pid}.tmp").write_bytes(b"half")
    assert start(*preprocess(raw, tmp_path / "parts")).wait() == 0
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    assert tree(raw) == before


def test_the_workers_of_a_killed_preprocessing_end(raw, tmp_path):
    process = start(*preprocess(raw, tmp_path / "out"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.parent.is_dir():
        pytest.skip("needs /proc")
    while len(workers := children.read_text().split()) < 3 and process.poll() is None:  # two, and a resource tracker
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
              for pid in workers):  # fmt: skip
        assert time.monotonic() < deadline, "the workers outlive the script"
        time.sleep(0.05)


def test_a_killed_worker_is_reported_and_the_next_run_goes_on(raw, tmp_path, monkeypatch, capsys):
    def broken(*args, **more):
        raise preprocessing.BrokenProcessPool("as a test has it")

    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "tqdm", broken)
        assert preprocessing.main([str(part) for part in preprocess(raw, tmp_path / "out")[1:]]) == 1
    assert "a worker process died (out of memory?); rerun with fewer --workers" in capsys.readouterr().err
    assert start(*preprocess(raw, tmp_path / "out")).wait() == 0


def test_two_preprocessings_at_once_make_what_one_makes(raw, tmp_path):
    both = [start(*preprocess(raw, tmp_path / "both")) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting for another process" in text for text in said) == 1
    assert start(*preprocess(raw, tmp_path / "one")).wait() == 0
    assert tree(tmp_path / "both") == tree(tmp_path / "one")


def small_files_only():
    """Stands for a full disk: no file may grow beyond 20 000 bytes; images are larger, masks and statistics are not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_reported_per_file_and_nothing_half_written_is_left(raw, tmp_path):
    process = start(*preprocess(raw, tmp_path / "out"), preexec_fn=small_files_only)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.count("left out: ") == 10 and err.count(".npy: File too large") == 10
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]
    assert start(*preprocess(raw, tmp_path / "out")).wait() == 0


def test_files_that_may_not_be_read_or_vanish_are_reported_one_by_one(raw, tmp_path, capsys, monkeypatch):
    shutil.copytree(raw, tmp_path / "raw")
    pairs, _ = preprocessing.list_pairs(tmp_path / "raw", "cityscapes", "train")
    settings = preprocessing.Settings("cityscapes7", (32, 32), "float32")
    pairs[0].image.unlink()
    pairs[1].labels.unlink()
    for pair, path in ((pairs[0], pairs[0].image), (pairs[1], pairs[1].labels)):
        record = preprocessing.process(pair, "train", tmp_path / "out", settings, False)
        assert record.error == f"{path}: No such file or directory"

    def denied(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("unetseg.pictures.read_bytes", denied)
    record = preprocessing.process(pairs[2], "train", tmp_path / "out", settings, False)
    assert record.error == f"{pairs[2].image}: Permission denied"


# ---- the parts


def test_a_failed_write_names_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with (
        pytest.raises(OSError, match=r"No space left .*; free some space, .*: '.*a.json'"),
        atomic_open(path) as f,
    ):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"] and "old" in path.read_text()


def test_leftovers_go_and_foreign_files_stay(tmp_path):
    for place in (tmp_path, tmp_path / "a_processed" / "train", tmp_path / "run"):
        place.mkdir(parents=True, exist_ok=True)
        for name in (".state.pt.123.tmp", ".a\nb.npy.7.tmp", "mine.tmp", ".mine.tmp", ".x.12.tmp.bak"):
            (place / name).touch()
    with exclusive(tmp_path, below=("*_processed/*",)):
        for place, count in ((tmp_path, 3), (tmp_path / "a_processed" / "train", 3), (tmp_path / "run", 5)):
            assert len([path for path in place.iterdir() if path.is_file() and path.name != ".lock"]) == count
