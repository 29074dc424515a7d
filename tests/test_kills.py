"""Killed anywhere and started again, training and preprocessing end as if nothing had been."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, process, same, tree, wait_for, without_timings

from unetseg import checkpoint
from unetseg.files import exclusive

SCRIPT = ROOT / "preprocessing" / "image_segmentation_preprocessing.py"
# The command line, killed at the given call of a function: while a file is written, in a step, in evaluation ...
DYING = """
import os, signal, sys
from unetseg import __main__, run, train, checkpoint
from unetseg.tools import preprocess
train.SAVE_SECONDS = 0
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
    environment = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes, **options)


@pytest.fixture
def train(processed, tmp_path):
    """The command that trains into tmp_path/<name>."""
    options = ["--channels", 4, "--depth", 2, "--epochs", 3, "--batch-size", 2, "--precision", "bf16", "--occlusion", 1]
    return lambda name: ["train", "scratch", "--data", processed, *options, "--out", tmp_path / name]


def test_a_training_killed_anywhere_ends_as_if_nothing_had_been(train, tmp_path):
    places = [("os", "fsync", 3), ("train", "confusion_matrices", 1), ("train", "forward", 3)]
    assert start("-m", "unetseg", *train("whole")).wait() == 0
    for owner, name, count in places:
        killed = start("-c", DYING, owner, name, count, *train("parts"))
        assert killed.wait() == -signal.SIGKILL, (name, killed.stderr.read())
    assert start("-m", "unetseg", *train("parts")).wait() == 0
    states = []
    for name in ("whole", "parts"):
        state = checkpoint.load_state(tmp_path / name, checkpoint.read_config(tmp_path / name))
        states.append(state | {"history": without_timings(state["history"]), "seconds": 0})
    assert same(*states)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1] and len(checkpoint.read_history(tmp_path / "parts")) == 3
    assert not list((tmp_path / "parts").glob(".*.tmp"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_gives_its_exit_status(train, tmp_path, number, status):
    process = start("-m", "unetseg", *train("run"), "--epochs", 5000)
    wait_for(tmp_path / "run" / "model.safetensors", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err, err
    assert f"{number.name}, stopped in epoch" in err and "run the same command to resume" in err


@pytest.mark.parametrize("seconds, number, status", [(0.3, signal.SIGINT, 130), (1.8, signal.SIGTERM, 143)])
def test_a_signal_while_it_starts_is_quiet(train, seconds, number, status):
    """In Python's own start, a fraction of a second, it is Python that answers."""
    process = start("-m", "unetseg", *train("run"), "--epochs", 5000)
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err, err


def test_out_of_time_ends_with_status_0_in_time(train, tmp_path):
    began = time.monotonic()
    process = start("-m", "unetseg", *train("run"), "--epochs", 100_000, "--max-minutes", 0.1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "time limit reached, stopped in epoch" in err, out
    assert time.monotonic() - began < 6 + 9  # 9 seconds for Python itself to start and end


def test_two_trainings_do_not_share_a_folder(train, tmp_path):
    with exclusive(tmp_path / "run"):
        process = start("-m", "unetseg", *train("run"))
        assert process.wait() == 1 and "another process is writing here" in process.stderr.read()


def test_closed_streams_no_home_and_no_name_are_no_traceback(train, tmp_path):
    command = " ".join(f"'{part}'" for part in [sys.executable, "-m", "unetseg", *train("run")])
    environment = {key: os.environ[key] for key in ("PATH", "PYTHONPATH")} | {"WANDB_MODE": "offline", "HOME": "/none"}
    for name, closing in (("both", ">&- 2>&-"), ("pipe", "| true")):
        done = subprocess.run(["sh", "-c", f"{command.replace('/run', '/' + name)} {closing}"], env=environment,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert len(checkpoint.read_history(tmp_path / name)) == 3


# ---- preprocessing


def command(raw, out, *options):
    return ["preprocess", "--data-dir", raw, "--output-dir", out, "--size", "64", "--workers", 2, *options]


def test_a_preprocessing_killed_anywhere_ends_as_if_nothing_had_been(raw, tmp_path):
    """Nor is anything mixed while the classes change: train and val are of one class set, or a split is not there."""
    before, parts, other = tree(raw), tmp_path / "parts", ["--classes", "cityscapes19"]
    assert start("-m", "unetseg", *command(raw, tmp_path / "whole", *other)).wait() == 0
    for enough in (1, 4, 9):  # images there when the kill comes; the workers must notice by themselves
        killed = start("-m", "unetseg", *command(raw, parts))
        while killed.poll() is None and len(list(parts.rglob("*.npy"))) < enough:
            time.sleep(0.001)
        killed.kill()
        assert killed.wait() in (-signal.SIGKILL, 0)
        assert not list(parts.glob("stats_*.json")) or killed.returncode == 0
    assert start("-m", "unetseg", *command(raw, parts)).wait() == 0
    places = [("os", "replace", count) for count in (9, 20, 27)] + [("preprocess", "write_stats", 2)]
    for owner, name, count in places:  # in the middle of moving a split into place, among others
        killed = start("-c", DYING, owner, name, count, *command(raw, parts, "--overwrite", *other))
        assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
        sets = {checkpoint.read_json(path)["class_set"] for path in parts.glob("stats_*.json")}
        assert len(sets) < 2 or "moving.json" in tree(parts / ".unfinished")
    assert start("-m", "unetseg", *command(raw, parts, *other)).wait() == 0
    assert tree(parts) == tree(tmp_path / "whole") and tree(raw) == before


def test_the_workers_of_a_killed_preprocessing_end(raw, tmp_path):
    process = start("-m", "unetseg", *command(raw, tmp_path / "out"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.parent.is_dir():
        pytest.skip("needs /proc")
    while len(workers := children.read_text().split()) < 3 and process.poll() is None:  # two, and a resource tracker
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
              for pid in workers):  # fmt: skip
        assert time.monotonic() < deadline, "the workers outlive the script"
        time.sleep(0.05)


def test_two_preprocessings_at_once_make_what_one_makes(raw, tmp_path):
    both = [start(SCRIPT, *command(raw, tmp_path / "both")[1:]) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting for another process" in text for text in said) == 1
    assert process(raw, tmp_path / "one", "--size", "64", "--sample_size", "5") == 0
    assert tree(tmp_path / "both") == tree(tmp_path / "one")


def small_files_only():
    """Stands for a full disk: no file may grow beyond 20 000 bytes; images are larger, masks and statistics are not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_leaves_what_was_made(raw, tmp_path):
    """Of a first run and of one that makes everything anew."""
    assert process(raw, tmp_path / "out", "--size", "16") == 0
    before = tree(tmp_path / "out")
    full = start("-m", "unetseg", *command(raw, tmp_path / "out"), preexec_fn=small_files_only)
    _, err = full.communicate(timeout=120)
    assert full.returncode == 1 and "Traceback" not in err and ".npy: File too large" in err, err
    assert {name: content for name, content in tree(tmp_path / "out").items() if ".unfinished" not in name} == before
    assert start("-m", "unetseg", *command(raw, tmp_path / "out")).wait() == 0
    assert not (tmp_path / "out" / ".unfinished").exists()


# ---- the parts


def test_leftovers_go_and_foreign_files_stay(tmp_path):
    for name in (".state.pt.0a1b2c3d.tmp", ".a\nb.npy.00000007.tmp", "mine.tmp", ".mine.tmp", ".x.0a1b2c3d.tmp.bak"):
        (tmp_path / name).touch()
    with exclusive(tmp_path):
        kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {".lock", ".mine.tmp", ".x.0a1b2c3d.tmp.bak", "mine.tmp"}


@pytest.mark.parametrize("number", [37, 95, 5])  # ENOLCK, EOPNOTSUPP, EIO
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys, number):
    def acquire(*args, **more):
        raise OSError(number, "no locks")

    monkeypatch.setattr("unetseg.files.FileLock.acquire", acquire)
    with exclusive(tmp_path):
        assert "this file system has no locks" in capsys.readouterr().err
