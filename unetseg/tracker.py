"""The training's end of a W&B run, which lives in a process of its own: W&B may wait without an end, or crash.

Training hands over what is to be logged and does not look back; at the end it waits for a limited time.
"""

import os
import signal
import threading
import time
import warnings
from multiprocessing import Queue, get_context, parent_process
from multiprocessing.synchronize import Event
from pathlib import Path

from .pool import ctrl_c_for_us_alone

TIMEOUT = 120  # seconds that uploading may take at the end of a run


class Tracker:
    """The training's end of a W&B run; nothing here waits, but for `finish`, or raises."""

    def __init__(self, project: str, run: Path, config: dict) -> None:
        spawn = get_context("spawn")
        self.records, self.messages, self.started = spawn.Queue(), spawn.Queue(), spawn.Event()
        arguments = self.records, self.messages, self.started, project, run, config
        self.process = spawn.Process(target=_mirror, args=arguments, daemon=True)
        self.wanted = os.environ.get("WANDB_MODE") != "disabled"
        if self.wanted:
            with ctrl_c_for_us_alone():
                self.process.start()

    def epoch(self, record: dict, pictures: tuple | None = None) -> None:
        """Log a row of history with its scores and, where there are some, pictures, as `Mirror.epoch` takes them."""
        self._hand_over("epoch", record, pictures)

    def best(self, *values: object) -> None:
        """Log the best weights and what they do, as `Mirror.best` takes it."""
        self._hand_over("best", *values)

    def _hand_over(self, *record: object) -> None:
        if self.wanted:
            self.records.put(record)
            self._warn()

    def _warn(self) -> None:
        while not self.messages.empty():
            warnings.warn(f"W&B: {self.messages.get()}", stacklevel=4)

    def finish(self) -> None:
        """End the W&B run, waiting no longer than TIMEOUT for its uploads, and half as long for one not begun."""
        if not self.wanted:
            return
        try:
            self._hand_over("finish")
            if self.process.is_alive() and self.started.wait(TIMEOUT / 2):
                self.process.join(TIMEOUT)
            if self.process.exitcode != 0:
                how = "not done" if self.process.is_alive() else "ended by itself"
                warnings.warn(f"W&B: {how}; the run goes on, `wandb sync` uploads the rest later", stacklevel=3)
        finally:
            self.process.kill()
            self.process.join()
            self._warn()
            self.records.cancel_join_thread()


def _mirror(records: Queue, messages: Queue, started: Event, project: str, run: Path, config: dict) -> None:
    """The other end, a process of its own: log the records as they come, until "finish" or the first failure."""
    from .tracking import Mirror, ServerGone  # here, because only this process needs W&B

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # training decides when to end
    threading.Thread(target=_end_with_training, args=(records,), daemon=True).start()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        mirror = Mirror(project, run, config, messages.put)
        started.set()
        while (record := records.get())[0] != "finish":
            getattr(mirror, record[0])(*record[1:])
        mirror.finish(*record[1:])
    except ServerGone as error:
        messages.put(f"{error}; `wandb sync` uploads later")
        mirror.leave_server()
    except Exception as error:  # whatever happens to W&B, training goes on
        messages.put(f"logging stopped ({error}); the run goes on")
    started.set()
    messages.close()
    messages.join_thread()
    os._exit(0)  # W&B's own exit would wait for its server


def _end_with_training(records: Queue) -> None:
    """End the W&B run of a training that was killed: W&B writes its file in pieces, the last of them at the end."""
    parent_process().join()
    records.put(("finish", 1))
    time.sleep(TIMEOUT)
    os._exit(1)
