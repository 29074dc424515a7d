import copy
import math
import signal
import time

import pytest
import torch

from unetseg import checkpoint, engine
from unetseg.augment import basic
from unetseg.data import Batches, load_split
from unetseg.engine import Job, Trainer, TrainingStopped, evaluate, fit
from unetseg.losses import ce_dice, cross_entropy
from unetseg.model import UNet
from unetseg.session import Session
from unetseg.trainer import out_of_memory


@pytest.fixture(scope="module")
def sets(processed):
    return load_split(processed, "train"), load_split(processed, "val")


CONFIG = dict.fromkeys(checkpoint.METADATA, "0") | {"class_set": "cityscapes7", "channels": "4", "depth": "2"}
CONFIG |= {"width": "64", "height": "32", "void": "ignore"}


def train(sets, run, epochs=4, loss_fn=cross_entropy, log=lambda record: None, lr=3e-3, precision="fp32", session=None):
    torch.manual_seed(0)
    model = UNet(7, channels=4, depth=2)
    train_batches = Batches(sets[0], 2, torch.device("cpu"), 0, lambda i, m, rows, indices: basic(i, m, rows))
    trainer = Trainer(model, epochs * len(train_batches), lr, 0.01, precision)
    job = Job(run, epochs, sets[0].class_set.names, "ignore", CONFIG)
    val_batches = Batches(sets[1], 2, torch.device("cpu"))
    keeper = engine.Keeper(trainer, job, session or Session())
    return trainer, fit(keeper, loss_fn, train_batches, val_batches, log)


def without_timings(history):
    return [{key: row[key] for key in row if key not in ("seconds", "images_per_second")} for row in history]


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


class Stopping(Session):
    """Is over at the given looks, of which each batch, of training and of val, takes one."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def over(self, reserve=0.0):
        self.looks = [look - 1 for look in self.looks]
        return "test" if 0 in self.looks else ""


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopped_at_any_step_a_run_ends_as_the_uninterrupted_one(sets, tmp_path, precision):
    whole, history = train(sets, tmp_path / "whole", precision=precision)
    looks = 4 * (3 + 1)  # four epochs of three training batches and one val batch
    for every in (2, 3, 5):
        run, parts = tmp_path / f"every{every}", []
        for _ in range(looks):  # each time one batch more or less is done before the next stop
            resumed, parts = train(sets, run, precision=precision, session=Stopping([every]))
            if len(parts) == 4:
                break
        assert same(whole.state(), resumed.state())
        assert (
            without_timings(parts)
            == without_timings(history)
            == without_timings(checkpoint.load_state(run)["position"]["history"])
        )
        assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_what_a_kill_between_two_saves_loses_is_done_again(sets, tmp_path, monkeypatch):
    whole, history = train(sets, tmp_path / "whole")
    for kept in range(1, 5):  # the state saved last; weights and history are already further on
        run, count = tmp_path / f"kept{kept}", []
        save = checkpoint.save_state

        def save_some(path, state, count=count, kept=kept, save=save):
            count.append(0)
            if len(count) <= kept:
                save(path, state)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_state", save_some)
            patch.setattr(engine, "SAVE_SECONDS", 0.0)
            train(sets, run, epochs=4)
        resumed, parts = train(sets, run)
        assert same(whole.state(), resumed.state()) and without_timings(parts) == without_timings(history)
        assert without_timings(checkpoint.read_history(run)) == without_timings(history)


def test_a_signal_saves_and_is_then_delivered(sets, tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        whole, _ = train(sets, tmp_path / "whole")
        for number in (signal.SIGTERM, signal.SIGINT):
            run, at = tmp_path / number.name, []

            def loss_fn(logits, mask, at=at, number=number):
                at.append(0)
                if len(at) == 5:  # the second step of the second epoch: three of training, one of val before it
                    signal.raise_signal(number)
                return cross_entropy(logits, mask)

            if number == signal.SIGTERM:
                train(sets, run, loss_fn=loss_fn)
                assert seen == [signal.SIGTERM]
            else:
                with pytest.raises(KeyboardInterrupt):
                    train(sets, run, loss_fn=loss_fn)
            assert checkpoint.load_state(run)["position"]["step"] == 1
            assert same(whole.state(), train(sets, run)[0].state())
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_is_not_hidden_by_a_signal():
    with pytest.raises(OSError, match="disk full"), Session() as session:
        signal.raise_signal(signal.SIGINT)
        assert session.over() == "SIGINT"
        raise OSError("disk full")


def test_a_session_is_over_before_its_minutes_are():
    now = time.monotonic()
    assert Session(1.0, started=now - 61).over() == "the time is up"
    assert Session(1.0, started=now).over() == "" and Session().over() == ""
    assert Session(1.0, started=now - 50).over(reserve=20) == "the time is up"
    session = Session(1.0, started=now - 50)
    session.looked = now - 8  # a step took 8 seconds; two more would be too many
    assert session.over() == "the time is up"


def test_out_of_time_returns_the_history_so_far_and_says_how_to_go_on(sets, tmp_path, capsys):
    _, history = train(sets, tmp_path, session=Stopping([6]))
    assert len(history) == 1
    said = capsys.readouterr().err
    assert "stopped (test) in epoch 2 of 4, after step 2 of 3; saved: the same again goes on from here" in said


def diverging(*bad):
    """Cross-entropy, but for the calls of training steps numbered so; those give NaN, or an infinite constant more."""
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
    records = []
    with pytest.warns(UserWarning, match="epoch 2: 2 steps were skipped"):
        _, history = train(sets, tmp_path, loss_fn=diverging(4, 5), log=records.append)
    assert [record["skipped_steps"] for record in records] == [0, 2, 0, 0]
    assert all(math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]) for row in history)
    assert all(value.isfinite().all() for value in checkpoint.load_weights(tmp_path)[0].values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_leaves_weights_optimiser_and_statistics_alone(sets, value):
    torch.manual_seed(0)
    trainer = Trainer(UNet(7, channels=4, depth=2), 9, 1e-2, 0.01, "fp32")
    images, masks = sets[0].batch(torch.arange(4))
    trainer.step(images, masks, cross_entropy)
    before = copy.deepcopy(trainer.state())
    for loss_fn in (lambda *args: cross_entropy(*args) * value, lambda *args: cross_entropy(*args) + value):
        assert not trainer.step(images, masks, loss_fn)[1]
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = value  # the network itself gives what is not finite
    before["model"]["head.weight"][0, 0] = value
    images[0, 0, 0, 0] = value
    assert not trainer.step(images, masks, cross_entropy)[1]
    after = trainer.state()
    assert same(after["moments"], before["moments"])
    for key in after["model"]:
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(after["model"][key], before["model"][key], rtol=0, atol=0, equal_nan=True)
    assert trainer.step(*sets[0].batch(torch.arange(4)), cross_entropy)[0].isnan()  # of the weight above, no other


def test_too_many_steps_in_a_row_stop_with_the_last_good_checkpoint(sets, tmp_path):
    with pytest.raises(TrainingStopped, match=r"not finite in 10 steps in a row, up to step 2 of epoch 5; .* lower lr"):
        train(sets, tmp_path, epochs=6, loss_fn=diverging(*range(5, 30)))
    assert all(value.isfinite().all() for value in checkpoint.load_weights(tmp_path)[0].values())
    position = checkpoint.load_state(tmp_path)["position"]
    assert len(position["history"]) == 4 and position["sums"].tolist() == [0, 0, 0, 8]


def test_a_network_that_answers_with_one_class_is_reported(sets, tmp_path):
    with pytest.warns(UserWarning, match=r"99.6% of the val predictions are (\w+): the network collapsed"):
        train(sets, tmp_path, epochs=1, loss_fn=lambda logits, mask: 0 * logits.sum() - logits[:, 1].mean(), lr=1.0)


class Normless(torch.nn.Module):
    """A U-Net whose normalisation does not depend on the batch, that cannot take more than `most` images at once."""

    def __init__(self, most):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.most = UNet(7, channels=4, depth=2), most
        for block in [*self.net.down, *self.net.merge]:
            for place, layer in enumerate(block):
                if isinstance(layer, torch.nn.BatchNorm2d):
                    block[place] = torch.nn.GroupNorm(1, layer.num_features)

    def forward(self, images):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (as a test has it)")
        return self.net(images)


@pytest.mark.parametrize("loss_fn", [cross_entropy, ce_dice])
@pytest.mark.parametrize("most, part", [(3, 3), (2, 2), (1, 1)])
def test_out_of_memory_halves_the_parts_and_changes_nothing_else(sets, loss_fn, most, part):
    images, masks = sets[0].batch(torch.arange(6))
    whole, halved = (Trainer(Normless(limit), 5, 1e-2, 0.01, "fp32") for limit in (6, most))
    gradients = []
    for trainer in (whole, halved):
        trainer.optimizer.register_step_pre_hook(
            lambda optimizer, *_: gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        )
    whole_loss, _ = whole.step(images, masks, loss_fn)
    with pytest.warns(UserWarning, match="out of memory with 6 images at a time; going on with 3 at a time"):
        halved_loss, finite = halved.step(images, masks, loss_fn)
    assert finite and halved.part == part
    torch.testing.assert_close(whole_loss, halved_loss, rtol=1e-6, atol=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_parts_survive_a_resume_and_one_image_too_many_stops():
    trainer = Trainer(Normless(0), 5, 1e-2, 0.01, "fp32")
    batch = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.long)
    with (
        pytest.warns(UserWarning),
        pytest.raises(TrainingStopped, match=r"one image at a time \(CUDA .*\); choose fewer"),
    ):
        trainer.step(*batch, cross_entropy)
    other = Trainer(Normless(2), 5, 1e-2, 0.01, "fp32")
    other.load(trainer.state())
    assert other.part == 1


def test_batch_statistics_count_each_image_once(sets):
    images, masks = sets[0].batch(torch.arange(4))
    torch.manual_seed(0)
    trainer = Trainer(UNet(7, channels=4, depth=2), 5, 0.0, 0.0, "fp32")
    by_hand = copy.deepcopy(trainer.model).train()
    trainer.part = 2
    trainer.step(images, masks, cross_entropy)
    for part in images.split(2):
        by_hand(part.contiguous(memory_format=torch.channels_last))
    assert torch.equal(trainer.model.down[0][1].running_mean, by_hand.down[0][1].running_mean)


def test_what_the_cpu_says_when_memory_is_out_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert out_of_memory(error.value) and not out_of_memory(RuntimeError("shapes differ"))


def test_a_full_disk_leaves_the_last_good_checkpoint(sets, tmp_path):
    """The limit on a file's size stands for the disk: the state fits under it, and no more after the second save."""
    import resource

    train(sets, tmp_path, session=Stopping([6]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"state.pt|model.safetensors"):
            train(sets, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    whole, history = train(sets, tmp_path / "whole")
    resumed, parts = train(sets, tmp_path)
    assert same(whole.state(), resumed.state()) and without_timings(parts) == without_timings(history)


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


def test_the_state_of_another_run_is_refused(sets, tmp_path):
    train(sets, tmp_path, epochs=1)
    trainer = Trainer(UNet(7, channels=4, depth=2), 3, 1e-2, 0.01, "fp32")
    job = Job(tmp_path, 1, sets[0].class_set.names, "ignore", CONFIG | {"seed": "1"})
    with pytest.raises(ValueError, match=r"state.pt: expected the state of this run, found seed: '0' in it, '1' now"):
        engine.resume(trainer, job)
    other = Trainer(UNet(7, channels=8, depth=2), 3, 1e-2, 0.01, "fp32")
    with pytest.raises(ValueError, match=r"state.pt: expected the state of this run, found RuntimeError"):
        engine.resume(other, Job(tmp_path, 1, sets[0].class_set.names, "ignore", CONFIG))


def test_weights_are_the_same_bytes_every_time(tmp_path):
    state = UNet(7, channels=4, depth=2).state_dict()
    for name in ("a", "b"):
        checkpoint.save_weights(tmp_path / name, state, CONFIG, 1, 0.5)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert same(checkpoint.load_weights(tmp_path / "a")[0], dict(state))
