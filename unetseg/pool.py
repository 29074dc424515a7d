"""Worker processes: spawned, because forking a process that has threads (OpenCV's, W&B's) can hang."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from .memory import keep_freed


def worker_pool(workers: int | None = None) -> ProcessPoolExecutor:
    """A pool of `workers` processes (default: all cores) that end with the main process.

    They start with the first task; hand that in under `ctrl_c_for_us_alone`.
    """
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin)


@contextmanager
def ctrl_c_for_us_alone() -> Iterator[None]:
    """Processes that are started in this block ignore Ctrl-C from their first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin() -> None:
    end_with_parent()
    keep_freed()


def end_with_parent() -> None:
    """Let this worker process end when its parent does; a parent that is killed cannot tell it to."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
