"""The machine's memory: how much is free, and keeping what this process has had."""

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed() -> None:
    """Let this process keep the memory it frees for what it allocates next, instead of handing it back.

    A network frees and allocates the same gigabyte in every step, and the system zeroes each page of it anew, which
    takes a sixth to a third of a step on a CPU (benchmarks/training.py). With other C libraries than glibc nothing
    changes. Calling it again does no harm.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_MAX, 0)
            library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_bytes() -> int:
    """Bytes that can be allocated without swapping, within the container's limit where there is one."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(facts["inactive_file"]))
    return free
