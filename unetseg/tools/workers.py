"""Worker processes: spawned, because forking a process that has threads (OpenCV's, W&B's) can hang."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process


def worker_pool(workers: int | None = None) -> ProcessPoolExecutor:
    """A pool of processes (default: one per core) that end with this one; submit the first task in `ignore_ctrl_c`."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)


@contextmanager
def ignore_ctrl_c() -> Iterator[None]:
    """Processes that are started in this block ignore Ctrl-C; the main process tells them when to end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with_parent() -> None:
    """End this worker when its parent ends; a parent that is killed cannot tell it to."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
