"""Two processes train as one does: the same samples, the same history, the same scores."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from unetseg import checkpoint, processes, stages
from unetseg.__main__ import main
from unetseg.data import Batches, load_split

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--channels", "4", "--depth", "2", "--epochs", "2", "--batch-size", "4", "--precision", "fp32"]

# The command with GroupNorm in BatchNorm's place, which does not depend on what else is in the batch.
PLAIN = """
import os, runpy, sys
import torch
from unetseg import engine, model
model.nn.BatchNorm2d = lambda channels: torch.nn.GroupNorm(1, channels)
engine.SAVE_SECONDS = float(os.environ.get("SAVE_SECONDS", 180))
sys.argv[0] = "unetseg"
runpy.run_module("unetseg", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "plain.py"
    script.write_text(PLAIN)
    return script


def start(number, script, *arguments, **more):
    """`train scratch` in so many processes; script None: the package's own command, through torchrun."""
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    what = ["-m", "unetseg"] if script is None else [script]
    command = [*(several if number > 1 else [sys.executable]), *what, "train", "scratch", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"} | more
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], env=environment, cwd=ROOT, **pipes)


def run(*arguments, **more):
    process = start(*arguments, **more)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def history(folder):
    keys = ("train_loss", "val_loss", "val_miou", "lr")
    return np.array([[row[key] for key in keys] for row in checkpoint.read_history(folder)])


def confusion(folder):
    return checkpoint.load_state(folder)["position"]["confusion"]


@pytest.fixture(scope="module")
def alone(plain, processed, tmp_path_factory):
    """One process's run of batches of 4 and 2: six images."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert run(1, plain, "--data", processed, "--out", folder, *TINY)[0] == 0
    return folder


@pytest.mark.parametrize("number", [2, 3])
def test_several_processes_give_one_processs_numbers(plain, processed, alone, tmp_path, number):
    """Three: the last batch of an epoch has two images, so that one of them has none."""
    status, out, err = run(number, plain, "--data", processed, "--out", tmp_path / "run", *TINY)
    assert status == 0, err
    np.testing.assert_allclose(history(tmp_path / "run"), history(alone), atol=1e-4)
    assert torch.equal(confusion(tmp_path / "run"), confusion(alone))
    assert out.count("best val mIoU") == 1  # one process speaks


def test_a_run_goes_on_with_another_number_of_processes(plain, processed, alone, tmp_path):
    command = ["--data", processed, "--out", tmp_path / "run", *TINY]
    for number in (2, 1):
        process = start(number, plain, *command, SAVE_SECONDS="0")
        while not (tmp_path / "run" / checkpoint.STATE).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    status, _, err = run(2, plain, *command)
    assert status == 0, err
    np.testing.assert_allclose(history(tmp_path / "run"), history(alone), atol=1e-4)
    assert torch.equal(confusion(tmp_path / "run"), confusion(alone))


def test_a_dead_process_ends_all_and_leaves_what_was_saved(plain, processed, tmp_path):
    command = ["--data", processed, "--out", tmp_path / "run", *TINY, "--epochs", "500"]
    process = start(2, plain, *command, SAVE_SECONDS="0")
    while not (tmp_path / "run" / checkpoint.STATE).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    workers = [int(pid) for pid in children if b"plain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(120) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert checkpoint.load_state(tmp_path / "run")["position"]["step"] >= 0
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_the_packages_own_command_under_torchrun(processed, tmp_path):
    """With BatchNorm, whose statistics are each process's own on a CPU: close to one process, and not the same."""
    status, out, err = run(2, None, "--data", processed, "--out", tmp_path / "two", *TINY)
    assert status == 0, err
    assert "written to" in out and "Traceback" not in err
    assert main(["train", "scratch", "--data", str(processed), "--out", str(tmp_path / "one"), *TINY]) == 0
    np.testing.assert_allclose(history(tmp_path / "two")[:, 0], history(tmp_path / "one")[:, 0], rtol=0.2)


@pytest.mark.parametrize("number, said", [(1, "at exit, at the end"), (2, "at exit")])
def test_several_processes_leave_without_pythons_last_steps(number, said):
    """Gloo's threads may abort them: one run in thirty did."""
    script = """
import atexit
from unetseg.__main__ import leave
class Last:
    def __del__(self):
        print(", at the end", end="")
last = Last()
atexit.register(print, "at exit", end="")
leave(3)
"""
    environment = os.environ | {"WORLD_SIZE": str(number)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (3, said)


def test_a_refusal_ends_all(plain, processed, alone):
    status, _, err = run(2, plain, "--data", processed, "--out", alone, *TINY, "--lr", "0.5")
    assert status == 1 and "begun with other settings" in err


def test_one_setting_starts_them(processed, tmp_path, monkeypatch, capfd):
    """What a notebook does with num_processes=2."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    facts = {"channels": 4, "depth": 2, "epochs": 2, "batch_size": 4, "precision": "fp32", "num_processes": 2}
    facts |= {"occlusion": 0.0, "aim_at": ["person", "vehicle"], "deterministic": True, "max_minutes": 10.0}
    settings = stages.Settings("scratch", str(processed), str(tmp_path / "run é"), **facts)
    rows = stages.train(settings, *stages.load_sets(settings))
    assert [row["epoch"] for row in rows] == [1, 2] and rows == stages.recorded(tmp_path / "run é")
    config = checkpoint.read_config(tmp_path / "run é")["settings"]
    assert config["occlusion"] == 0 and config["aim_at"] == ["person", "vehicle"] and config["deterministic"]
    out, err = capfd.readouterr()
    assert out == "" and err.count("0/12 [") == 1  # the first process has a bar; the caller speaks
    with pytest.raises(stages.TrainingStopped, match="exit status"):
        monkeypatch.setattr(stages, "as_arguments", lambda settings: ["scratch", "--nonsense"])
        bad = stages.Settings("scratch", str(processed), str(tmp_path / "bad"), num_processes=2)
        stages.train(bad, *stages.load_sets(bad))


@pytest.mark.parametrize("send", [os.killpg, os.kill])
def test_ctrl_c_reaches_all_and_the_run_is_saved(processed, tmp_path, send):
    """As a terminal sends it, to all that is in the foreground, and as `kill -INT` does, to the command alone."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "unetseg", "train", "scratch", "--num-processes=2", f"--data={processed}", *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    process = subprocess.Popen(
        [*command, "--epochs=5000", f"--out={out}"], env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    while not (out / checkpoint.HISTORY).exists():
        assert process.poll() is None
        time.sleep(0.01)
    send(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and b"the same command goes on from here" in err
    assert b"stopped (SIGINT) in epoch" in err
    position = checkpoint.load_state(out)["position"]
    assert len(position["history"]) == len(checkpoint.read_history(out)) > 0


def test_processes_end_with_the_one_that_launched_them(processed, tmp_path):
    """Killed, as a notebook's kernel may be, it can tell nobody."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "unetseg", "train", "scratch", "--num-processes=2", f"--data={processed}", *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    process = subprocess.Popen([*command, "--epochs=5000", f"--out={out}"], env=environment, stderr=subprocess.DEVNULL)
    while not (out / checkpoint.HISTORY).exists():
        assert process.poll() is None
        time.sleep(0.01)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 3  # torchrun and its two
    process.kill()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


def test_a_process_given_other_data_ends_all(plain, processed, tmp_path):
    """As when the second machine holds an older copy: the first one's fingerprint must not stand for it."""
    other = tmp_path / "other"
    shutil.copytree(processed, other)
    first, second = sorted((other / "masks_processed" / "train").iterdir())[:2]
    images = [other / "images_processed" / "train" / f"{path.stem}.npy" for path in (first, second)]
    for one, two in ((first, second), images):
        one.rename(tmp_path / "kept")
        two.rename(one)
        (tmp_path / "kept").rename(two)
    script = tmp_path / "script.py"
    here, there = str(processed), str(other)
    script.write_text(
        plain.read_text().replace(
            "sys.argv[0]",
            f"""if os.environ["RANK"] == "1":
    sys.argv = [{there!r} if argument == {here!r} else argument for argument in sys.argv]
sys.argv[0]""",
        )
    )
    status, _, err = run(2, script, "--data", processed, "--out", tmp_path / "run", *TINY)
    assert status != 0 and "expected what the first process was given" in err and "data_sha256" in err


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_the_parts_make_the_whole_batch(processed, monkeypatch, number):
    """Same samples, same augmentation, each once, whatever the number of processes."""
    train_set = load_split(processed, "train")
    settings = stages.resolve(stages.Settings("scratch", str(processed), "x"))
    batches = Batches(train_set, 4, torch.device("cpu"), 5, stages.augmentation(settings, train_set))
    whole = list(batches.epoch(3))
    monkeypatch.setattr(processes, "count", lambda: number)
    parts = []
    for rank in range(number):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(list(batches.epoch(3)))
    for place, (images, masks) in enumerate(whole):
        assert torch.equal(torch.cat([part[place][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[place][1] for part in parts]), masks)
