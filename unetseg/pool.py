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
    end_with_parent()


def end_with_parent() -> None:
    """Let this worker process end when its parent does; a parent that is killed cannot tell it to."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
