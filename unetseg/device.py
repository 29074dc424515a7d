"""Which device to compute on, and how: precision, memory format and compilation, by measurement on that very device."""

import contextlib
import importlib.util
import os
import platform
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import capability, memory
from .files import read_json, write_json

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DEFAULTS = {"cuda": ("fp16", "bf16", "fp32"), "cpu": ("fp32", "bf16")}  # the first stays unless another is faster
CLEARLY = 1.1  # times as fast, to be preferred
COMPILING = 60.0  # seconds that compiling may take; the run must be twenty times as long for it to be tried


@dataclass(frozen=True)
class Choice:
    """How a network computes on a device; `why` says it in words, with the seconds that were measured."""

    precision: str  # "fp32" (on a GPU with TF32, that), "fp16" or "bf16"
    memory_format: str  # "channels_last" or "contiguous"
    compile: bool
    why: str

    def __str__(self) -> str:
        compiled = ", compiled" if self.compile else ""
        return f"{self.precision}, {self.memory_format}{compiled}: {self.why}"


def pick_device() -> torch.device:
    """The GPU (of several, this process's own) or, where there is none, the CPU.

    Raises NoKernels for a GPU that this build of PyTorch cannot compute on; warns of one that it does not see.
    """
    if torch.cuda.is_available():
        capability.require_kernels(torch.cuda.current_device())
        return torch.device("cuda")
    if reason := capability.unused_gpu():
        warnings.warn(f"there is a GPU, but computing on the CPU: {reason}", stacklevel=2)
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """A name for reports: the GPU's, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def be_deterministic(wanted: bool) -> None:
    """Let a GPU take only algorithms that give the same bits every time, or else the fastest; before its first use."""
    if wanted:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.benchmark = not wanted
    if torch.are_deterministic_algorithms_enabled() != wanted:  # the call imports torch's compiler: two seconds
        torch.use_deterministic_algorithms(wanted, warn_only=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context for forward passes in "fp32", "fp16" or "bf16"."""
    enabled = precision != "fp32"
    return torch.autocast(device.type, DTYPES[precision] if enabled else torch.bfloat16, enabled=enabled)


def choose(
    model: nn.Module,
    size: tuple[int, int],
    num_steps: int = 0,
    precision: str = "auto",
    memory_format: str = "auto",
    compiled: str = "auto",
    training: bool = True,
) -> Choice:
    """What was asked for; where that is "auto", the fastest on this device for this model, by a few measured steps.

    The default (fp16 on a GPU, fp32 on a CPU, channels_last) stays unless another is clearly faster and its output
    agrees. What cannot run here is passed over. Compiling is tried on GPUs alone, for runs that would repay it. Answers
    are kept in the user's cache.

    num_steps  that the run will take
    compiled   "auto", "yes" or "no"
    training   whether to measure forward and backward passes, or forward passes alone
    """
    device = next(model.parameters()).device
    precisions = DEFAULTS[device.type] if precision == "auto" else (precision,)
    formats = tuple(FORMATS) if memory_format == "auto" else (memory_format,)
    candidates = [f"{one}, {other}" for one in precisions for other in formats]
    if len(candidates) == 1:
        chosen = Choice(*candidates[0].split(", "), False, "as asked for")
    else:
        chosen = _remembered(model, size, candidates, training)
    if compiled == "yes" or (compiled == "auto" and num_steps and _repays(model, size, chosen, num_steps)):
        why = "as asked for" if compiled == "yes" else f"{chosen.why}; compiled is faster still, and the run long"
        chosen = Choice(chosen.precision, chosen.memory_format, True, why)
    return chosen


def _remembered(model: nn.Module, size: tuple[int, int], candidates: list[str], training: bool) -> Choice:
    """The choice that was made here before for this device, torch version, model and size, or a new one."""
    device, num_weights = next(model.parameters()).device, sum(weight.numel() for weight in model.parameters())
    about = (device_name(device), f"torch {torch.__version__}", f"{num_weights} weights", f"{size[0]}x{size[1]}")
    key = " | ".join((*about, "training" if training else "inference", " / ".join(candidates)))
    path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "unetseg" / "choices.json"
    cache = {}
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        cache = read_json(path)
    with contextlib.suppress(KeyError, TypeError):  # not there, or something else
        found = Choice(**cache[key])
        if f"{found.precision}, {found.memory_format}" in candidates:
            return found
    chosen = _fastest(model, size, candidates, training)
    with contextlib.suppress(OSError):  # a read-only home costs a measurement per run, nothing else
        write_json(path, cache | {key: asdict(chosen)})
    return chosen


def _fastest(model: nn.Module, size: tuple[int, int], candidates: list[str], training: bool) -> Choice:
    seconds, outputs, failed = {}, {}, None
    for candidate in candidates:
        try:
            limit = 3 * min(seconds.values(), default=float("inf"))
            seconds[candidate], outputs[candidate] = _time(model, size, *candidate.split(", "), training, limit=limit)
        except RuntimeError as error:  # no kernel for it here, or no memory
            failed = error
    memory.hand_back()  # what follows needs other blocks
    if not seconds:
        raise failed
    default, best = next(iter(seconds)), min(seconds, key=seconds.get)
    exact = next((outputs[key] for key in outputs if key.startswith("fp32")), outputs[best])
    agrees = (outputs[best] - exact).abs().mean() < 0.1 * exact.std() + 1e-6
    if not agrees or seconds[best] * CLEARLY > seconds[default]:
        best = default
    others = ", ".join(f"{key.replace(',', '')} {value:.2g} s" for key, value in seconds.items() if key != best)
    kind = "a step" if training else "a forward pass"
    return Choice(*best.split(", "), False, f"{kind} of 2 images took {seconds[best]:.2g} s; {others}")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs, and is worth a try: not on CPUs, where it gained nothing."""
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return modern and importlib.util.find_spec("triton") is not None


def _repays(model: nn.Module, size: tuple[int, int], chosen: Choice, num_steps: int) -> bool:
    """Whether compiling works here, and saves a run of so many steps clearly more than it costs."""
    if not can_compile(next(model.parameters()).device):
        return False
    how = chosen.precision, chosen.memory_format
    try:
        plain, _ = _time(model, size, *how, batch_size=8)
        if plain * num_steps < 20 * COMPILING:
            return False
        start = time.perf_counter()
        fast, _ = _time(model, size, *how, batch_size=8, compiled=True)
    except Exception:  # no memory for 8 images, or a compiler's many ways to fail; nothing depends on it
        return False
    cost = time.perf_counter() - start
    return fast * CLEARLY < plain and (plain - fast) * num_steps > 2 * cost


def _time(
    model: nn.Module,
    size: tuple[int, int],
    precision: str,
    memory_format: str,
    training: bool = True,
    batch_size: int = 2,
    compiled: bool = False,
    limit: float = float("inf"),
) -> tuple[float, Tensor]:
    """Seconds per forward (and backward) pass, the faster of two after one to warm up, and the logits.

    limit  when the first takes as long, it is not done again
    The model's values are left as they were; its memory format is whatever was timed last.
    """
    was_training, state = model.training, {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch_size, 3, size[1], size[0], generator=generator).to(next(model.parameters()).device)
    model.to(memory_format=FORMATS[memory_format]).train(training)
    network = torch.compile(model, dynamic=False) if compiled else model
    seconds = []
    try:
        while len(seconds) < 3 and min(seconds, default=0.0) < limit:
            start = time.perf_counter()
            with autocast(image.device, precision), torch.set_grad_enabled(training):
                logits = network(image).float()
            if training:
                logits.square().mean().backward()
            if image.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    finally:
        model.zero_grad(set_to_none=True)
        model.load_state_dict(state)
        model.train(was_training)
    return min(seconds), logits.detach()
