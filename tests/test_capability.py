"""GPUs that are there but cannot be used: told by faked capabilities, before anything else touches them."""

import os

import pytest
import torch

from unetseg import capability, device

NEWEST = [
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_90",
    "sm_100",
    "sm_120",
    "compute_120",
]  # as the registry's builds from 2.15 on


@pytest.mark.parametrize("architectures, of_device, expected", [
    (NEWEST, (6, 0), False),  # P100
    (NEWEST, (7, 0), False),  # V100
    (NEWEST, (7, 5), True),  # T4
    (NEWEST, (8, 9), True),  # L4: an older minor version of the same major one
    (NEWEST, (9, 0), True),
    (NEWEST, (12, 1), True),
    (NEWEST, (13, 0), True),  # not yet built for: PTX serves later ones
    (["sm_60", "sm_70", "sm_90"], (6, 0), True),
    (["sm_61"], (6, 0), False),
    (["sm_90a"], (9, 0), True),
    (["sm_90a"], (9, 1), False),  # code for one version alone
    (["sm_100f"], (10, 3), True),
    (["sm_100f"], (12, 0), False),
    (["compute_60"], (9, 0), True),
    ([], (9, 0), False),
    (["gfx90a"], (9, 0), True),  # AMD's names say nothing here
])  # fmt: skip
def test_which_builds_support_which_device(architectures, of_device, expected):
    assert capability.supports(architectures, of_device) is expected


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a given capability, and whose kernels fail: there is none behind it."""

    def pretend(of_device, architectures):
        capability.require_kernels.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: of_device)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla P100-PCIE-16GB")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)

    yield pretend
    capability.require_kernels.cache_clear()


def test_a_pascal_card_under_a_newer_build_stops_with_the_ways_out(gpu):
    gpu((6, 0), NEWEST)
    with pytest.raises(capability.NoKernels) as stopped:
        device.pick_device()
    said = str(stopped.value)
    assert "Tesla P100-PCIE-16GB (sm_60)" in said and "has code for sm_75" in said
    assert "T4 x2" in said and f"%pip install -r {capability.PASCAL}" in said and "CUDA_VISIBLE_DEVICES" in said
    assert capability.PASCAL.is_file()


def test_a_kernel_that_fails_stops_too(gpu, monkeypatch):
    gpu((9, 0), NEWEST)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no kernel image\nmore")))
    with pytest.raises(capability.NoKernels, match=r"a first kernel failed: no kernel image\. What to do") as stopped:
        device.pick_device()
    assert "requirements-pascal" not in str(stopped.value)


def test_the_build_for_old_cards_is_pinned_and_from_pytorchs_own_index():
    lines = [line for line in capability.PASCAL.read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "--index-url https://download.pytorch.org/whl/cu126"
    assert [line.partition("==")[0] for line in lines[1:]] == ["torch", "torchvision"] and "==2.14" in lines[1]


@pytest.mark.parametrize("cuda, expected", [(None, "is a build for CPUs"), ("13.0", "needs a driver for CUDA 13.0")])
def test_the_cpu_beside_a_gpu_is_never_silent(monkeypatch, tmp_path, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.warns(UserWarning, match=f"computing on the CPU: .*{expected}"):
        assert device.pick_device().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert capability.unused_gpu() == ""  # hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert cuda is None or capability.unused_gpu() == "CUDA_VISIBLE_DEVICES=7 leaves none of those here"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    monkeypatch.setattr(capability, "PCI", tmp_path / "pci")
    assert capability.unused_gpu() == ""  # the driver's tools are installed, and there is no card
    (tmp_path / "pci" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "pci" / "0000:01:00.0" / "vendor").write_text("0x10de\n")
    (tmp_path / "pci" / "0000:01:00.0" / "class").write_text("0x030200\n")
    assert "its driver does not work (nvidia-smi: Failed to initialize NVML" in capability.unused_gpu()
