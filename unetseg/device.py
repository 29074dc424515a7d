"""The device to compute on, one that really runs a kernel, and its precision by rule."""

import os
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

import torch

from .files import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WAYS_OUT = """What to do: choose another accelerator (on Kaggle: Settings, Accelerator, GPU T4 x2);
or install the last build for older cards (P100, V100, GTX 10), in a cell of its own, and restart the kernel:
    pip install torch==2.14.1 torchvision==0.29.1 --index-url https://download.pytorch.org/whl/cu126
or compute on the CPU on purpose: set CUDA_VISIBLE_DEVICES to an empty text before the start"""


def pick_device() -> torch.device:
    """The GPU (of several, this process's own), or the CPU where there is none. Raises UserError for a GPU that this
    build of PyTorch cannot compute on; `torch.cuda.is_available()` is true then."""
    if torch.cuda.is_available():
        require_kernels(torch.cuda.current_device())
        return torch.device("cuda")
    if hidden := unused_gpu():
        warnings.warn(f"computing on the CPU although this machine has a GPU: {hidden}", stacklevel=2)
    return torch.device("cpu")


def require_kernels(index: int) -> None:
    """Raise UserError, with ways out, unless a first kernel runs on GPU `index`."""
    try:
        if (torch.ones(8, device=f"cuda:{index}") + 1).sum().item() == 16:
            return
        reason = "a first kernel gave a wrong result"
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
    name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    built = f"torch {torch.__version__}, built for {' '.join(torch.cuda.get_arch_list())}"
    raise UserError(f"{name} (sm_{major}{minor}) cannot be used with {built}: {reason}. {WAYS_OUT}")


def unused_gpu() -> str:
    """Why a GPU that the driver lists is not used, or "" when there is none or it was hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden or not shutil.which("nvidia-smi"):
        return ""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its driver does not answer ({error})"
    needs = f"needs a driver for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for CPUs"
    return f"torch {torch.__version__} {needs}, or CUDA_VISIBLE_DEVICES hides it" if "GPU" in listed else ""


def device_name(device: torch.device) -> str:
    """A name for reports: the GPU's, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def precision_rule(device: torch.device) -> str:
    """bf16 from compute capability 8 on, fp16 on 7.x, else fp32; on a CPU bf16 where it has instructions for it."""
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else []
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context for forward passes in "fp32", "fp16" or "bf16"."""
    return torch.autocast(device.type, DTYPES[precision] if precision != "fp32" else None, enabled=precision != "fp32")


def be_deterministic(wanted: bool) -> None:
    """On a GPU take algorithms that always give the same bits, or else the fastest; call before its first use."""
    if wanted:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.benchmark = not wanted
    if torch.are_deterministic_algorithms_enabled() != wanted:  # the call imports torch's compiler: two seconds
        torch.use_deterministic_algorithms(wanted, warn_only=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the GPU or of the machine did not suffice."""
    texts = ("can't allocate memory", "could not create a")  # PyTorch's allocator on a CPU, and oneDNN
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)
