"""Several processes train as one does: the same samples, the same gradients, the same history, the same scores."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, command, wait_for

from unetseg import checkpoint, distributed, run
from unetseg.data import Batches, load_split
from unetseg.files import read_json, write_json
from unetseg.settings import Settings, with_preset
from unetseg.train import TrainingStopped

TINY = ["--channels", "4", "--depth", "2", "--epochs", "2", "--batch-size", "4", "--precision", "fp32"]

# The command with GroupNorm in BatchNorm's place, which does not depend on what else is in the batch.
PLAIN = """
import os, runpy, sys
import torch
from unetseg import model, train
model.nn.BatchNorm2d = lambda channels: torch.nn.GroupNorm(1, channels)
train.SAVE_SECONDS = float(os.environ.get("SAVE_SECONDS", 180))
sys.argv[0] = "unetseg"
runpy.run_module("unetseg", run_name="__main__", alter_sys=True)
"""
# Gradients of every loss, of one process and of three together (the third has no image), by hand-made batches.
GRADIENTS = """
import sys, torch
from unetseg import distributed, losses
from unetseg.__main__ import leave
from unetseg.model import UNet
distributed.begin()
for name, loss_fn in losses.LOSSES.items():
    torch.manual_seed(0)
    model = UNet(5, 4, 1)
    for block in (*model.down, *model.merge):
        block[1], block[4] = torch.nn.GroupNorm(1, block[1].num_features), torch.nn.GroupNorm(1, block[4].num_features)
    model.double()
    images, masks = torch.rand(2, 3, 8, 8).double(), torch.randint(0, 5, (2, 8, 8))
    masks[0, :5] = 255
    weights = torch.rand(5).double()
    share, network = distributed.share(torch.arange(2)), distributed.wrap(model)
    loss = loss_fn(network(images[share]), masks[share], weights, distributed.all_sum)
    loss.backward()
    torch.save([loss.detach(), *(weight.grad for weight in model.parameters())], f"{sys.argv[1]}.{name}")
leave(0)
"""


def torchrun(number, *arguments, **more):
    """Start `number` processes, or one without torchrun."""
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    environment = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"} | more
    parts = [str(part) for part in (*(several if number > 1 else [sys.executable]), *arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(parts, env=environment, cwd=ROOT, start_new_session=True, **pipes)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def history(folder):
    keys = ("train_loss", "val_loss", "val_miou", "lr")
    return np.array([[row[key] for key in keys] for row in checkpoint.read_history(folder)])


def confusion(folder):
    return checkpoint.load_state(folder, checkpoint.read_config(folder))["confusion"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "plain.py"
    script.write_text(PLAIN)
    return script


@pytest.fixture(scope="module")
def alone(plain, processed, tmp_path_factory):
    """One process's run of batches of 4 and 2: six images."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert finish(torchrun(1, plain, "train", "scratch", "--data", processed, "--out", folder, *TINY))[0] == 0
    return folder


def test_every_loss_has_the_gradients_of_one_process(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    for number in (1, 3):
        status, _, err = finish(torchrun(number, tmp_path / "gradients.py", tmp_path / str(number)))
        assert status == 0, err
    names = [path.suffix for path in tmp_path.glob("1.*")]
    assert len(names) == 3
    for name in names:
        one, three = (torch.load(tmp_path / f"{number}{name}") for number in (1, 3))
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(one, three, strict=True)), name


def test_three_processes_give_one_processs_numbers(plain, processed, alone, tmp_path):
    """The last batch of an epoch has two images, so that one of the three has none."""
    parts = ["train", "scratch", "--data", processed, "--out", tmp_path / "run", *TINY]
    status, out, err = finish(torchrun(3, plain, *parts))
    assert status == 0, err
    np.testing.assert_allclose(history(tmp_path / "run"), history(alone), atol=1e-4)
    assert torch.equal(confusion(tmp_path / "run"), confusion(alone))
    assert out.count("val mIoU") == 1  # one process speaks


def test_a_run_resumes_with_another_number_of_processes(plain, processed, alone, tmp_path):
    parts = ["train", "scratch", "--data", processed, "--out", tmp_path / "run", *TINY]
    process = torchrun(2, plain, *parts, SAVE_SECONDS="0")
    wait_for(tmp_path / "run" / checkpoint.STATE, process)
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    status, _, err = finish(torchrun(1, plain, *parts))
    assert status == 0, err
    np.testing.assert_allclose(history(tmp_path / "run"), history(alone), atol=1e-4)
    assert torch.equal(confusion(tmp_path / "run"), confusion(alone))


def test_a_dead_process_ends_all_and_leaves_what_was_saved(plain, processed, tmp_path):
    parts = ["train", "scratch", "--data", processed, "--out", tmp_path / "run", *TINY, "--epochs", "500"]
    process = torchrun(2, plain, *parts, SAVE_SECONDS="0")
    wait_for(tmp_path / "run" / checkpoint.STATE, process)
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "plain.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    assert process.wait(120) != 0
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert checkpoint.load_state(tmp_path / "run", checkpoint.read_config(tmp_path / "run"))["step"] >= 0


def test_batch_statistics_are_averaged_on_a_cpu(processed, tmp_path):
    """With BatchNorm: close to one process, and not the same."""
    parts = ["train", "scratch", "--data", processed, *TINY]
    status, out, err = finish(torchrun(2, "-m", "unetseg", *parts, "--out", tmp_path / "two"))
    assert status == 0, err
    assert "see " in out and "Traceback" not in err
    assert command(*parts, "--out", tmp_path / "one") == 0
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
    environment = os.environ | {"WORLD_SIZE": str(number), "TORCHELASTIC_RUN_ID": "1"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (3, said)


def test_one_setting_starts_them_and_the_parent_logs_each_row(processed, tmp_path, capfd):
    """What a notebook does with num_processes=2."""
    facts = {"channels": 4, "depth": 2, "epochs": 3, "batch_size": 4, "num_processes": 2, "max_minutes": 10.0}
    settings = Settings("scratch", processed, tmp_path / "run é", aim_at=("person", "vehicle"), **facts)
    logged = []
    rows = run.train(settings, log=logged.append, sets=run.load_sets(settings))
    assert [row["epoch"] for row in logged] == [1, 2, 3] and rows == logged
    stored = checkpoint.read_config(tmp_path / "run é")["settings"]
    assert stored["occlusion"] == 0 and stored["aim_at"] == ["person", "vehicle"] and stored["num_processes"] == 2
    out, _ = capfd.readouterr()
    assert out == "" and not (tmp_path / "run é" / "wandb").exists()


def test_a_failure_of_the_processes_is_told(processed, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_json", lambda path, config: path.write_text("{}"))
    settings = Settings("scratch", processed, tmp_path / "bad", channels=4, depth=2, num_processes=2)
    with pytest.raises(TrainingStopped, match="ended with exit status 1; see above"):
        run.train(settings, log=print)


def launch(processed, out):
    """Start the command that starts two processes itself, and wait for its first epoch."""
    options = ["--num-processes=2", f"--data={processed}", *TINY, "--epochs=5000", f"--out={out}"]
    process = torchrun(1, "-m", "unetseg", "train", "scratch", *options)
    wait_for(out / checkpoint.HISTORY, process)
    return process


def test_one_interrupt_is_passed_on_and_the_run_is_saved(processed, tmp_path):
    """As a terminal sends it, to all that is in the foreground; the two are in a session of their own."""
    out = tmp_path / "run"
    process = launch(processed, out)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "run the same command again" in err
    assert "SIGINT, stopped in epoch" in err
    state = checkpoint.load_state(out, checkpoint.read_config(out))
    assert len(state["history"]) == len(checkpoint.read_history(out)) > 0


def test_processes_end_with_the_one_that_launched_them(processed, tmp_path):
    """Killed, as a notebook's kernel may be, it can tell nobody."""
    process = launch(processed, tmp_path / "run")
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 3  # torchrun and its two
    process.kill()
    assert not psutil.wait_procs(started, timeout=60)[1]


def test_a_process_given_other_data_ends_all(plain, processed, tmp_path):
    """As when the second machine holds another copy: the first one's fingerprint must not stand for it."""
    other = shutil.copytree(processed, tmp_path / "other")
    stats = read_json(other / "stats_train.json")
    next(iter(stats["files"].values()))["crc32"] += 1
    write_json(other / "stats_train.json", stats)
    script, here, there = tmp_path / "script.py", str(processed), str(other)
    swapped = f"""if os.environ["RANK"] == "1":
    sys.argv = [{there!r} if argument == {here!r} else argument for argument in sys.argv]
sys.argv[0]"""
    script.write_text(plain.read_text().replace("sys.argv[0]", swapped))
    parts = ["train", "scratch", "--data", processed, "--out", tmp_path / "run", *TINY]
    status, _, err = finish(torchrun(2, script, *parts))
    assert status != 0 and "this process was given other data than the first process" in err


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_the_shares_make_the_whole_batch(processed, monkeypatch, number):
    """Same samples, same augmentation, each once, whatever the number of processes."""
    settings = with_preset(Settings(seed=5, occlusion=0.5))
    batches = Batches(load_split(processed, "train"), 4, torch.device("cpu"), settings)
    whole = list(batches.epoch(3))
    monkeypatch.setattr(distributed, "world", lambda: number)
    parts = []
    for rank in range(number):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(list(batches.epoch(3)))
    for place, batch in enumerate(whole):
        for of, tensor in enumerate(batch):
            assert torch.equal(torch.cat([part[place][of] for part in parts]), tensor)


def test_no_process_is_forked():
    for path in [*ROOT.glob("unetseg/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("notebooks/*.py")]:
        text = Path(path).read_text(encoding="utf-8")
        assert "os.fork" not in text and 'get_context("fork")' not in text, path
        spawned = text.count('ProcessPoolExecutor(workers, get_context("spawn")')
        assert text.count("ProcessPoolExecutor(") == spawned, path
