"""The device that really runs a kernel, told by faked cards, and precision by rule."""

import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from unetseg import device
from unetseg.files import UserError


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a given capability, whose kernels fail: there is none behind it."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla P100-PCIE-16GB")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])

    return pretend


def test_a_card_that_runs_no_kernel_stops_with_the_ways_out(gpu, monkeypatch):
    gpu((6, 0))
    monkeypatch.setattr(torch, "ones", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no kernel image\nmore")))
    with pytest.raises(UserError) as stopped:
        device.pick_device()
    said = str(stopped.value)
    assert "Tesla P100-PCIE-16GB (sm_60) cannot be used" in said and "built for sm_75 sm_90: no kernel image" in said
    assert "T4 x2" in said and "CUDA_VISIBLE_DEVICES" in said


def test_the_build_for_old_cards_is_the_pinned_one_from_pytorchs_own_index():
    lines = [line for line in (ROOT / "requirements-pascal.txt").read_text().splitlines() if not line.startswith("#")]
    index, *packages = lines
    assert f"pip install {' '.join(packages)} {index}" in device.WAYS_OUT and "whl/cu126" in index


def test_a_kernel_with_a_wrong_result_stops_too(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch, "ones", lambda *a, **k: torch.zeros(8))
    with pytest.raises(UserError, match="a first kernel gave a wrong result"):
        device.pick_device()


@pytest.mark.parametrize("cuda, expected", [(None, "is a build for CPUs"), ("13.0", "needs a driver for CUDA 13.0")])
def test_the_cpu_beside_a_gpu_is_never_silent(monkeypatch, tmp_path, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.warns(UserWarning, match=f"computing on the CPU although this machine has a GPU: .*{expected}"):
        assert device.pick_device().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.unused_gpu() == ""  # hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 18\n")
    assert device.unused_gpu() == ""  # the driver's tools are installed, and there is no card


CARD = {(5, 0): "fp32", (6, 0): "fp32", (7, 0): "fp16", (7, 5): "fp16", (8, 0): "bf16", (8, 9): "bf16", (12, 0): "bf16"}


@pytest.mark.parametrize("capability, precision", CARD.items())
def test_precision_on_a_gpu_follows_its_generation(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    assert device.precision_rule(torch.device("cuda")) == precision


@pytest.mark.parametrize("flags, precision", [
    ("fpu avx2", "fp32"), ("avx512f avx512_bf16", "bf16"), ("amx_bf16 amx_tile", "bf16"), (None, "fp32"),
])  # fmt: skip
def test_precision_on_a_cpu_follows_its_instructions(monkeypatch, flags, precision):
    monkeypatch.setattr(Path, "is_file", lambda self: flags is not None)
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags}\n")
    assert device.precision_rule(torch.device("cpu")) == precision


def test_autocast_is_what_it_says():
    layer, image = torch.nn.Conv2d(3, 2, 1), torch.rand(1, 3, 4, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with device.autocast(torch.device("cpu"), precision):
            assert layer(image).dtype == dtype
