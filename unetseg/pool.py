"""Worker processes: spawned, because forking a process that has threads (OpenCV's, W&B's) can hang."""

import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def worker_pool(workers: int | None = None) -> ProcessPoolExecutor:
    """A pool of `workers` processes (default: all cores) that leave Ctrl-C to the main process."""
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    return ProcessPoolExecutor(workers, get_context("spawn"), **quiet)
