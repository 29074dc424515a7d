"""Which device and precision to train in; the precision is measured, once per device, torch version, model and size."""

import contextlib
import os
import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from .files import read_json, write_json

DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """A name for reports: the GPU's, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def be_deterministic() -> None:
    """Let a GPU take only algorithms that give the same bits every time; to be called before its first use."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context for forward passes in "fp32", "fp16" or "bf16"."""
    return torch.autocast(device.type, DTYPES[precision] or torch.bfloat16, enabled=precision != "fp32")


def choose_precision(asked: str, model: nn.Module, size: tuple[int, int]) -> str:
    """The precision asked for, or for "auto" the fastest for training this model, by a few measured steps.

    The default (fp16 on a GPU, fp32 on a CPU) stays unless another is 10 % faster and its output agrees. The
    answer is kept in the user's cache.
    """
    if asked != "auto":
        return asked
    device = next(model.parameters()).device
    candidates = ["fp16", "bf16", "fp32"] if device.type == "cuda" else ["fp32", "bf16"]
    num_weights = sum(weight.numel() for weight in model.parameters())
    key = f"{device_name(device)} | torch {torch.__version__} | {num_weights} weights | {size[0]}x{size[1]}"
    path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "unetseg" / "precision.json"
    cache = {}
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        cache = read_json(path)
    if cache.get(key) in candidates:
        return cache[key]
    seconds, outputs = {}, {}
    for precision in candidates:
        seconds[precision], outputs[precision] = _time_steps(model, size, precision)
    best = min(seconds, key=seconds.get)
    spread = outputs["fp32"].std() + 1e-6
    agrees = (outputs[best] - outputs["fp32"]).abs().mean() < 0.1 * spread
    chosen = best if agrees and seconds[best] < seconds[candidates[0]] / 1.1 else candidates[0]
    with contextlib.suppress(OSError):  # a read-only home costs a measurement per run, nothing else
        write_json(path, cache | {key: chosen})
    return chosen


def seconds_per_image(model: nn.Module, size: tuple[int, int], precision: str) -> float:
    """Seconds of training per image, measured."""
    return _time_steps(model, size, precision, batch_size=8)[0] / 8


def _time_steps(
    model: nn.Module, size: tuple[int, int], precision: str, batch_size: int = 2, steps: int = 2
) -> tuple[float, Tensor]:
    """Seconds per forward and backward pass, after one to warm up, and the logits; the model is left as it was."""
    was_training, state = model.training, {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch_size, 3, size[1], size[0], generator=generator).to(next(model.parameters()).device)
    image = image.contiguous(memory_format=torch.channels_last)
    model.train()
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        with autocast(image.device, precision):
            logits = model(image).float()
        logits.square().mean().backward()
        if image.is_cuda:
            torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    model.train(was_training)
    return seconds, logits.detach()
