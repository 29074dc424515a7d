"""The loop: exact resume from any stop, skipped steps, divergence, memory, disk, more epochs."""

import math
import resource
import shutil
import signal
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import same, without_timings

from unetseg import checkpoint, run
from unetseg.data import Batches, load_split
from unetseg.device import out_of_memory
from unetseg.files import UserError, write_json
from unetseg.losses import cross_entropy
from unetseg.metrics import scores
from unetseg.model import UNet, build_model
from unetseg.settings import Settings
from unetseg.train import State, Stopper, TrainingStopped, evaluate, fit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sets(processed):
    return load_split(processed, "train"), load_split(processed, "val")


class Stopping(Stopper):
    """Stops at given calls, one of which comes with each batch of training and of val."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def reason(self, reserve=0.0):
        self.calls = [call - 1 for call in self.calls]
        return "test" if 0 in self.calls else ""


def learn(sets, folder, epochs=4, loss_fn=cross_entropy, log=lambda row: None, stopper=None, batch_size=2, **changes):
    """Train a tiny network on three batches an epoch; returns the state and the history."""
    tiny = {"model": "unet", "channels": 4, "depth": 2, "precision": "fp32", "occlusion": 0.0}
    settings = run.resolve(Settings(out=str(folder), batch_size=batch_size, epochs=epochs, **tiny | changes))
    splits = {name: {"sha256": s.split.sha256} for name, s in zip(("train", "val"), sets)}
    config = {"settings": asdict(settings), "cycles": [epochs], "data": splits}
    config |= {"init_sha256": None, "format": checkpoint.FORMAT}
    config |= {**sets[0].class_set.facts(), "width": 64, "height": 32}
    folder.mkdir(exist_ok=True)
    write_json(folder / checkpoint.CONFIG, config)
    torch.manual_seed(0)
    train_batches = Batches(sets[0], batch_size, CPU, settings)
    state = State(build_model(asdict(settings), 7), folder, config, len(train_batches), stopper or Stopper())
    return state, fit(state, loss_fn, train_batches, Batches(sets[1], batch_size, CPU), log)


def content(folder):
    """What must be the same to the bit, however often a run was stopped."""
    config = checkpoint.read_config(folder)
    state = checkpoint.load_state(folder, config)
    state["history"] = without_timings(state["history"])
    return {key: value for key, value in state.items() if key != "seconds"}


def test_training_learns_and_leaves_the_run_folder(sets, tmp_path):
    rows = []
    _, history = learn(sets, tmp_path, log=rows.append)
    assert history[-1]["train_loss"] < history[0]["train_loss"] and rows == history
    assert [row["epoch"] for row in checkpoint.read_history(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "history.csv").read_text().startswith("epoch,train_loss,val_loss,val_miou,lr,seconds,images_per")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "history.csv", "state.pt", "config.json"}


def test_the_last_weights_are_kept_and_score_what_the_history_says(sets, tmp_path):
    _, history = learn(sets, tmp_path)
    model, about = checkpoint.load_model(tmp_path)
    assert about["epoch"] == 4 and about["val_miou"] == history[-1]["val_miou"]
    result = evaluate(model, Batches(sets[1], 2, CPU).epoch(), 7, cross_entropy)
    assert scores(result.confusion, sets[1].class_set.names, "ignore")["miou"] == history[-1]["val_miou"]


def test_the_average_is_the_mean_of_the_first_steps_and_then_forgets(sets, tmp_path, monkeypatch):
    """Six steps of three an epoch: the mean of six, as the window has six; the seventh pushes by a sixth."""
    seen = []
    update = State.update_average

    def watch(state):
        update(state)
        seen.append((state.model.head.bias.detach().clone(), state.average.module.head.bias.detach().clone()))

    monkeypatch.setattr(State, "update_average", watch)
    learn(sets, tmp_path, epochs=3)
    weights, averages = (torch.stack(column) for column in zip(*seen))
    assert torch.allclose(averages[5], weights[:6].mean(dim=0), atol=1e-6)
    assert torch.allclose(averages[6], averages[5] * 5 / 6 + weights[6] / 6, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopped_at_any_step_a_run_ends_as_the_uninterrupted_one(sets, tmp_path, precision):
    learn(sets, tmp_path / "whole", precision=precision)
    whole = content(tmp_path / "whole")
    calls = 4 * (3 + 1)  # four epochs of three training batches and one val batch
    for every in (2, 5):
        folder, parts = tmp_path / f"every{every}", []
        for _ in range(calls):  # each time one batch more or less is done before the next stop
            _, parts = learn(sets, folder, precision=precision, stopper=Stopping([every]))
            if len(parts) == 4:
                break
        assert same(whole, content(folder))
        weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "whole")]
        assert weights[0] == weights[1]


def test_the_state_is_the_only_truth(sets, tmp_path):
    """Weights and history that are lost, or older than the state, are written again from it."""
    learn(sets, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "spoiled")
    (tmp_path / "spoiled" / "model.safetensors").unlink()
    (tmp_path / "spoiled" / "history.csv").write_text("epoch\n1\n")
    state, _ = learn(sets, tmp_path / "spoiled")
    for name in ("model.safetensors", "history.csv"):
        assert (tmp_path / "spoiled" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert state.epoch == 5


def test_a_signal_saves_and_is_then_delivered(sets, tmp_path):
    calls = []

    def loss_fn(logits, mask):
        calls.append(0)
        if len(calls) == 5:  # the first step of the second epoch: three of training, one of val before it
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(logits, mask)

    with pytest.raises(KeyboardInterrupt):
        learn(sets, tmp_path, loss_fn=loss_fn)
    assert content(tmp_path)["step"] == 1


def test_an_error_is_not_hidden_by_a_signal():
    stopper = Stopper()
    with pytest.raises(OSError, match="disk full"), stopper.listening():
        signal.raise_signal(signal.SIGINT)
        assert stopper.reason() == "SIGINT"
        raise OSError("disk full")


def test_an_ignored_signal_stays_ignored(request):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Stopper().listening():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_the_time_limit_is_reached_before_its_minutes_are_over():
    stopper = Stopper(1.0)
    assert stopper.reason() == "" and Stopper().reason() == ""
    stopper.deadline = time.monotonic() + 10
    assert stopper.reason(reserve=20) == "time limit reached"
    stopper.looked = time.monotonic() - 8  # a step took 8 seconds; two more would be too many
    assert stopper.reason() == "time limit reached"


def test_a_stop_returns_the_history_so_far_and_says_how_to_resume(sets, tmp_path, capsys):
    _, history = learn(sets, tmp_path, stopper=Stopping([6]))
    assert len(history) == 1
    said = capsys.readouterr().err
    assert "test, stopped in epoch 2 of 4, after step 2 of 3. State saved: run the same command to resume." in said


def diverging(*bad):
    """Cross-entropy, but for the training steps numbered so; those give NaN, or an infinite constant more."""
    calls = []

    def loss_fn(logits, mask):
        loss = cross_entropy(logits, mask)
        if not torch.is_grad_enabled():
            return loss
        calls.append(0)
        if len(calls) not in bad:
            return loss
        return loss * math.nan if len(calls) % 2 else loss + math.inf  # the second has finite gradients

    return loss_fn


def test_steps_that_are_not_finite_are_skipped_and_counted(sets, tmp_path):
    with pytest.warns(UserWarning, match="epoch 2: 2 steps were skipped"):
        _, history = learn(sets, tmp_path, loss_fn=diverging(4, 5))
    assert [row["skipped_steps"] for row in history] == [0, 2, 0, 0]
    assert all(math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]) for row in history)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_skipped_step_leaves_weights_optimiser_and_statistics_alone(sets, tmp_path, precision):
    """The state after the first step of the second epoch, which is not finite, is that before it."""
    learn(sets, tmp_path / "before", stopper=Stopping([4]), precision=precision)
    learn(sets, tmp_path / "after", stopper=Stopping([5]), precision=precision, loss_fn=diverging(4))
    before, after = content(tmp_path / "before"), content(tmp_path / "after")
    assert after["sums"].tolist()[2:] == [1, 1] and same(after["moments"], before["moments"])
    for key, value in after["model"].items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, before["model"][key]), key


def test_too_many_skipped_steps_in_a_row_stop_with_what_was_saved(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("unetseg.train.SAVE_SHARE", 0)  # however short an epoch is
    with pytest.raises(TrainingStopped, match=r"not finite in 10 steps in a row, up to step 2 of epoch 5; .* lower lr"):
        learn(sets, tmp_path, epochs=6, loss_fn=diverging(*range(5, 30)))
    state = content(tmp_path)
    assert len(state["history"]) == 4 and state["sums"].tolist() == [0, 0, 0, 8]
    assert all(value.isfinite().all() for value in checkpoint.load_model(tmp_path)[0].state_dict().values())


def test_short_epochs_are_not_saved_one_by_one(sets, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("unetseg.train.SAVE_SHARE", 1e9)
    monkeypatch.setattr(State, "write_results", lambda state: saved.append(len(state.history)))
    learn(sets, tmp_path)
    assert saved == [1, 4]  # the first, when nobody knows yet what a save takes, and the last


def test_diverged_training_has_no_best_weights_and_says_so(sets, tmp_path):
    def loss_fn(logits, mask):
        return cross_entropy(logits, mask) if torch.is_grad_enabled() else logits.sum() * math.nan

    with pytest.raises(TrainingStopped, match="lower lr"):
        learn(sets, tmp_path, loss_fn=loss_fn)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_network_that_answers_with_one_class_is_reported(sets, tmp_path):
    with pytest.warns(UserWarning, match=r"of the predictions are (\w+): it collapsed"):
        learn(sets, tmp_path, epochs=4, loss_fn=lambda logits, mask: 0 * logits.sum() - logits[:, 1].mean(), lr=1.0)


@pytest.mark.parametrize("batch_size, advice", [(6, "try --batch-size 3"), (1, "use fewer channels")])
def test_out_of_memory_says_which_batch_size_to_try(sets, tmp_path, batch_size, advice):
    def loss_fn(logits, mask):
        raise torch.OutOfMemoryError("CUDA out of memory (as a test has it)")

    with pytest.raises(TrainingStopped, match=f"out of memory with batch size {batch_size}: {advice}"):
        learn(sets, tmp_path, loss_fn=loss_fn, batch_size=batch_size)
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert out_of_memory(error.value) and not out_of_memory(RuntimeError("shapes differ"))


def test_a_full_disk_leaves_what_was_saved(sets, tmp_path):
    """The limit on a file's size stands for the disk."""
    learn(sets, tmp_path / "whole")
    learn(sets, tmp_path / "full", stopper=Stopping([6]))
    before = {path.name: path.read_bytes() for path in (tmp_path / "full").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"(state.pt|model.safetensors): File too large"):
            learn(sets, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "full").iterdir()} == before
    learn(sets, tmp_path / "full")
    assert same(content(tmp_path / "whole"), content(tmp_path / "full"))


def test_training_ends_when_its_folder_is_removed(sets, tmp_path):
    with pytest.raises(UserError, match="the run folder was removed during training"):
        learn(sets, tmp_path / "run", log=lambda row: shutil.rmtree(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cycles, epoch, lr", [([4], 1, 4e-3), ([4], 4, None), ([4, 8], 5, 4e-3)])
def test_every_cycle_starts_low_peaks_and_ends_lower(sets, tmp_path, cycles, epoch, lr):
    state, _ = learn(sets, tmp_path, epochs=1, lr=0.1)
    state.config = state.config | {"cycles": cycles}
    state.history = [{}] * (epoch - 1)
    schedule = state.schedule()
    rates = []
    for _ in range((next(end for end in cycles if end >= epoch) - epoch + 1) * 3):
        rates.append(schedule.get_last_lr()[0])
        state.optimizer.step()
        schedule.step()
    assert lr is None or (rates[0] == pytest.approx(lr) and max(rates) == pytest.approx(0.1, rel=0.05))
    assert rates[-1] < 0.02


def test_scores_do_not_depend_on_the_batch_size_and_each_image_has_its_own(sets):
    torch.manual_seed(0)
    model = UNet(7, channels=4, depth=2)
    results = [evaluate(model, Batches(sets[0], size, CPU).epoch(), 7, cross_entropy) for size in (1, 4, 6)]
    assert results[0].confusions.shape == (6, 8, 7) and results[0].confusions.dtype == np.int64
    assert all((result.confusions == results[0].confusions).all() for result in results)
    assert (results[0].confusion == results[0].confusions.sum(axis=0)).all()
    assert (results[0].confusions.sum(axis=(1, 2)) == 64 * 32).all()


def test_the_void_rule_of_an_evaluation_concerns_the_loss_alone(sets):
    torch.manual_seed(0)
    model = UNet(7, channels=4, depth=2)
    epochs = [(rule, Batches(sets[0], 3, CPU).epoch()) for rule in ("ignore", "background")]
    ignore, background = (evaluate(model, epoch, 7, cross_entropy, void=rule) for rule, epoch in epochs)
    assert (ignore.confusion == background.confusion).all() and ignore.loss != background.loss


def test_a_state_that_is_damaged_or_of_another_run_is_refused(sets, tmp_path):
    learn(sets, tmp_path, epochs=1)
    with pytest.raises(UserError, match=r"(?s)state.pt: this state is from another run .*seed: 0 there, 1 here"):
        learn(sets, tmp_path, epochs=1, seed=1)
    whole = (tmp_path / "state.pt").read_bytes()
    for spoiled in (whole[:100], whole[: len(whole) // 2], b"", b"not a state"):
        (tmp_path / "state.pt").write_bytes(spoiled)
        with pytest.raises(UserError, match=r"state.pt: expected a training state of this version.*--init"):
            learn(sets, tmp_path, epochs=1)


def test_memory_that_runs_out_while_reading_is_not_called_damage(sets, tmp_path, monkeypatch):
    learn(sets, tmp_path, epochs=1)
    error = RuntimeError("can't allocate memory")
    monkeypatch.setattr(torch, "load", lambda *args, **more: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="can't allocate"):
        checkpoint.load_state(tmp_path, checkpoint.read_config(tmp_path))
