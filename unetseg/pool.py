"""Worker processes: spawned, because forking a process that has threads (OpenCV's, W&B's) can hang."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process


def worker_pool(workers: int | None = None) -> ProcessPoolExecutor:
    """A pool of `workers` processes (default: all cores) that leave Ctrl-C to the main process and end with it."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()  # killed, it cannot tell us
    os._exit(1)
