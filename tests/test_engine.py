import shutil

import pytest
import torch

from unetseg import checkpoint, engine
from unetseg.augment import basic
from unetseg.data import Batches, load_split
from unetseg.engine import Job, Trainer, TrainingStopped, evaluate, fit
from unetseg.losses import cross_entropy
from unetseg.model import UNet


class Interrupted(Exception):
    """Stands for a session that ends."""


@pytest.fixture(scope="module")
def sets(processed):
    return load_split(processed, "train"), load_split(processed, "val")


def train(sets, run, epochs=4, loss_fn=cross_entropy, log=lambda record: None, lr=3e-3):
    torch.manual_seed(0)
    model = UNet(7, channels=4, depth=2)
    train_batches = Batches(sets[0], 4, torch.device("cpu"), 0, lambda i, m, rows, indices: basic(i, m, rows))
    trainer = Trainer(model, epochs * len(train_batches), lr, 0.01, "fp32")
    metadata = dict.fromkeys(checkpoint.METADATA, "0")
    job = Job(run, epochs, sets[0].class_set.names, "ignore", metadata)
    return trainer, fit(trainer, loss_fn, train_batches, Batches(sets[1], 2, torch.device("cpu")), job, log)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_training_learns_and_leaves_the_run_folder(sets, tmp_path):
    records = []
    _, history = train(sets, tmp_path, log=records.append)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert [row["epoch"] for row in checkpoint.read_history(tmp_path)] == [1, 2, 3, 4]
    assert [record["scores"]["miou"] for record in records] == [row["val_miou"] for row in history]
    header = (tmp_path / "history.csv").read_text().splitlines()[0]
    assert header == "epoch,train_loss,val_loss,val_miou,lr,seconds,images_per_second"
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "history.csv", "state.pt"}


@pytest.mark.parametrize("num_steps", range(1, 13))
def test_any_number_of_steps_has_a_schedule(num_steps):
    trainer = Trainer(UNet(2, channels=2, depth=1), num_steps, 0.1, 0.0, "fp32")
    for _ in range(num_steps):
        trainer.optimizer.step()
        trainer.scheduler.step()
        assert 0 < trainer.lr <= 0.1 + 1e-9


def test_the_best_weights_are_kept(sets, tmp_path):
    _, history = train(sets, tmp_path)
    state, metadata = checkpoint.load_weights(tmp_path)
    best = max(history, key=lambda row: row["val_miou"])
    assert int(metadata["epoch"]) == best["epoch"]
    model = UNet(7, channels=4, depth=2)
    model.load_state_dict(state)
    result = evaluate(model, Batches(sets[1], 2, "cpu").epoch(), 7, cross_entropy)
    assert engine.scores(result.confusion, sets[1].class_set.names, "ignore")["miou"] == best["val_miou"]


def test_an_interrupted_run_ends_as_the_uninterrupted_one(sets, tmp_path):
    def stop(record):
        if record["epoch"] == 2:
            raise Interrupted

    whole, history = train(sets, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(sets, tmp_path / "parts", log=stop)
    resumed, parts = train(sets, tmp_path / "parts")
    assert same(whole.state(), resumed.state())
    timings = ("seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in timings} for row in history] == [
        {k: v for k, v in row.items() if k not in timings} for row in parts
    ]


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(sets, tmp_path):
    calls = []

    def diverging(logits, mask):
        calls.append(0)
        return cross_entropy(logits, mask) * (float("nan") if len(calls) > 5 else 1)

    with pytest.raises(TrainingStopped, match=r"nan in epoch 2; the best weights so far are in"):
        train(sets, tmp_path, loss_fn=diverging)
    assert len(checkpoint.read_history(tmp_path)) == 1
    assert all(torch.isfinite(value).all() for value in checkpoint.load_weights(tmp_path)[0].values())


def test_scores_do_not_depend_on_the_batch_size(sets):
    torch.manual_seed(0)
    model = UNet(7, channels=4, depth=2)
    results = [evaluate(model, Batches(sets[0], size, "cpu").epoch(), 7, cross_entropy) for size in (1, 4, 6)]
    assert all((result.confusion == results[0].confusion).all() for result in results)


def test_the_void_rule_of_an_evaluation_concerns_the_loss_alone(sets):
    torch.manual_seed(0)
    model = UNet(7, channels=4, depth=2)
    ignore, background = (
        evaluate(model, Batches(sets[0], 3, "cpu").epoch(), 7, cross_entropy, void=rule)
        for rule in ("ignore", "background")
    )
    assert (ignore.confusion == background.confusion).all() and ignore.loss != background.loss


def test_damaged_checkpoints_are_named(sets, tmp_path):
    train(sets, tmp_path / "run", epochs=1)
    for name in ("state.pt", "model.safetensors"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        (tmp_path / name / name).write_bytes((tmp_path / "run" / name).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state.pt: expected a training state"):
        checkpoint.load_state(tmp_path / "state.pt" / "state.pt")
    with pytest.raises(ValueError, match=r"model.safetensors: expected a safetensors file"):
        checkpoint.load_weights(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected trained weights, found nothing"):
        checkpoint.load_weights(tmp_path / "nowhere")


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save(Payload(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="expected a training state"):
        checkpoint.load_state(tmp_path / "state.pt")
    assert not (tmp_path / "owned").exists()
