"""Worker processes: spawned, because forking a process that has threads (OpenCV's, W&B's) can hang."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process


def worker_pool(workers: int | None = None) -> ProcessPoolExecutor:
    """A pool of processes (default: one per core) that leave Ctrl-C to this one, and end with it."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this worker when its parent ends, and only then; a parent that is killed cannot tell it to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
