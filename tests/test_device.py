"""Settings by measurement: what is chosen, when it is measured, and that nothing depends on what cannot run."""

import torch

from unetseg import device, memory
from unetseg.model import UNet
from unetseg.trainer import Trainer

SIZE = (32, 32)


def timings(monkeypatch, seconds, outputs=None):
    """Let `choose` find these seconds per candidate, and outputs; returns what it measured, in order."""
    asked = []

    def fake(model, size, precision, memory_format, training=True, batch_size=2, compiled=False, limit=None):
        key = f"{precision}, {memory_format}" + (", compiled" if compiled else "")
        asked.append(key)
        if key not in seconds:
            raise RuntimeError("no kernel")
        return seconds[key], (outputs or {}).get(precision, torch.tensor([1.0, 2.0]))

    monkeypatch.setattr(device, "_time", fake)
    return asked


def cpu(precision, memory_format):
    return {"fp32, channels_last": 1.0, "fp32, contiguous": 1.5, f"{precision}, {memory_format}": 0.5}


def model(channels):
    """Networks of different size do not share what is remembered."""
    return UNet(7, channels, 1)


def test_the_fastest_is_chosen_said_and_remembered(monkeypatch):
    asked = timings(monkeypatch, cpu("bf16", "channels_last"))
    chosen = device.choose(model(1), SIZE)
    assert (chosen.precision, chosen.memory_format, chosen.compile) == ("bf16", "channels_last", False)
    assert str(chosen).startswith("bf16, channels_last: a step of 2 images took 0.5 s; fp32 channels_last 1 s")
    assert len(asked) == 4
    assert device.choose(model(1), SIZE) == chosen and len(asked) == 4
    device.choose(model(1), (64, 32))
    assert len(asked) == 8


def test_the_default_stays_unless_another_is_clearly_faster(monkeypatch):
    timings(monkeypatch, {"fp32, channels_last": 1.0, "bf16, contiguous": 0.95})
    assert str(device.choose(model(2), SIZE)).startswith("fp32, channels_last")


def test_a_precision_whose_output_disagrees_is_not_chosen(monkeypatch):
    timings(monkeypatch, cpu("bf16", "channels_last"), {"bf16": torch.tensor([9.0, -3.0])})
    assert device.choose(model(3), SIZE).precision == "fp32"
    timings(monkeypatch, cpu("bf16", "channels_last"), {"bf16": torch.tensor([torch.nan, 2.0])})
    assert device.choose(model(4), SIZE).precision == "fp32"


def test_what_cannot_run_here_is_passed_over(monkeypatch):
    timings(monkeypatch, {"fp32, contiguous": 2.0})
    assert str(device.choose(model(5), SIZE)).startswith("fp32, contiguous")


def test_what_is_asked_for_is_not_measured(monkeypatch):
    asked = timings(monkeypatch, {})
    chosen = device.choose(model(6), SIZE, precision="bf16", memory_format="contiguous", compiled="yes")
    assert (chosen.precision, chosen.memory_format, chosen.compile) == ("bf16", "contiguous", True) and not asked


def test_compiling_has_to_repay_itself(monkeypatch):
    seconds = {"fp32, channels_last": 0.1, "fp32, channels_last, compiled": 0.05}
    how = {"precision": "fp32", "memory_format": "channels_last"}
    asked = timings(monkeypatch, seconds)
    assert not device.choose(model(7), SIZE, 10**6, **how).compile and not asked  # a CPU
    monkeypatch.setattr(device, "can_compile", lambda where: True)
    assert not device.choose(model(7), SIZE, 100, **how).compile and len(asked) == 1  # a run of ten seconds
    assert device.choose(model(7), SIZE, 10**6, **how).compile and len(asked) == 3
    assert not device.choose(model(7), SIZE, 10**6, compiled="no", **how).compile and len(asked) == 3
    timings(monkeypatch, seconds | {"fp32, channels_last, compiled": 0.095})
    assert not device.choose(model(7), SIZE, 10**6, **how).compile
    timings(monkeypatch, {"fp32, channels_last": 0.1})  # the compiler fails
    assert not device.choose(model(7), SIZE, 10**6, **how).compile


def test_measuring_leaves_the_network_as_it_was():
    network = UNet(7, 4, 2).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    seconds, logits = device._time(network, SIZE, "fp32", "channels_last")
    assert seconds > 0 and logits.shape == (2, 7, 32, 32)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not network.training and all(weight.grad is None for weight in network.parameters())


def test_only_whole_batches_go_through_the_compiled_network(monkeypatch):
    seen = []

    def compile_(network, dynamic):
        return lambda images: seen.append(len(images)) or network(images)

    monkeypatch.setattr(torch, "compile", compile_)
    trainer = Trainer(UNet(7, 4, 2), 10, 1e-3, 0.01, "fp32", "contiguous", compiled=True)
    for size in (4, 4, 3):
        trainer.step(torch.rand(size, 3, 32, 32), torch.zeros(size, 32, 32, dtype=torch.long), lambda a, b: a.mean())
    assert seen == [4, 4]


def test_free_memory_is_known_and_keeping_it_does_no_harm():
    assert 2**20 < memory.free_bytes() < 2**50
    memory.keep_freed()
    memory.keep_freed()
    memory.hand_back()
