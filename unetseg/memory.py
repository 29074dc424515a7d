"""The machine's memory: how much is free, and keeping what this process has had."""

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT = 32 << 20  # bytes that a block may have; more is faster still, but large networks then need more memory


def keep_freed() -> None:
    """Let this process keep the blocks it frees for what it allocates next, instead of handing them back.

    A network frees and allocates the same gigabyte in every step, and the system zeroes each page of it anew. With
    other C libraries than glibc nothing changes. Calling it again does no harm.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, KEPT)
    _glibc("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)


def hand_back() -> None:
    """Hand back what has been kept so far."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL(None), function)(*arguments)


def free_bytes() -> int:
    """Bytes that can be allocated without swapping, within the container's limit where there is one."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(facts["inactive_file"]))
    return free
