"""Whether this build of PyTorch can compute on the GPU here; `torch.cuda.is_available()` says only that one is."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

PCI = Path("/sys/bus/pci/devices")
PASCAL = Path(__file__).resolve().parents[1] / "requirements-pascal.txt"


class NoKernels(RuntimeError):
    """The GPU cannot be used by this build; the message says why, and what to do."""


def supports(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether a build for these architectures ("sm_75", "compute_90" ...) has code for a device of this capability.

    Machine code (sm) serves its own major version from its minor version on, and PTX (compute) everything from its
    version on; those with a letter serve one version alone.
    """
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]*)", architecture)
        if found is None:  # AMD's, say: the first kernel will tell
            return True
        kind, major, minor, letter = found.groups()
        built = int(major), int(minor)
        if letter:
            fits = built == capability if letter != "f" else built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability and (kind == "compute" or built[0] == capability[0])
        if fits:
            return True
    return False


@functools.cache
def require_kernels(index: int) -> None:
    """Raise NoKernels if this build has no code for GPU `index`, or a first kernel does not run on it."""
    capability, architectures = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    reason = ""
    if not supports(architectures, capability):
        reason = f"this build of PyTorch has code for {' '.join(architectures)}"
    else:
        try:
            if (torch.ones(8, device=f"cuda:{index}") + 1).sum().item() != 16:
                reason = "a first kernel gave a wrong result"
        except RuntimeError as error:
            reason = f"a first kernel failed: {str(error).partition(chr(10))[0]}"
    if reason:
        name = f"{torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]})"
        raise NoKernels(
            f"expected to compute on {name} with torch {torch.__version__}, found: {reason}. {ways_out(capability)}"
        )


def ways_out(capability: tuple[int, int]) -> str:
    """What a user can do about a GPU that this build does not support."""
    ways = ["choose another accelerator (on Kaggle: Settings, Accelerator, GPU T4 x2)"]
    if (5, 0) <= capability < (7, 5):
        ways.append(
            f"or install the last build with code for older cards, in a cell of its own, and restart the kernel:\n"
            f"    %pip install -r {PASCAL}\n"
        )
    else:
        ways.append("or install a build of PyTorch for this card")
    ways.append("or compute on the CPU knowingly, by setting CUDA_VISIBLE_DEVICES to an empty text before the start")
    return "What to do: " + "; ".join(ways)


def _is_card(device: Path) -> bool:
    """Whether a device on the PCI bus is an NVIDIA display or 3D controller."""
    try:
        return (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03")
    except OSError:
        return False


def unused_gpu() -> str:
    """Why a GPU that this machine has is not used, or "" when it has none or hides it on purpose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or visible in ("", "-1", "NoDevFiles") or not shutil.which("nvidia-smi"):
        return ""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its driver does not answer ({error})"
    if not listed.stdout.startswith("GPU"):
        said = (listed.stdout + listed.stderr).strip().partition("\n")[0]
        return f"its driver does not work (nvidia-smi: {said})" if any(map(_is_card, PCI.glob("*"))) else ""
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible} leaves none of those here"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for CPUs; install one for CUDA"
    return f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}; see `nvidia-smi` for the one here"
