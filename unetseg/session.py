"""When to stop before the end: the session's time is nearly up, or SIGINT or SIGTERM has come."""

import math
import signal
import threading
import time
from types import FrameType, TracebackType


class Session:
    """Inside its block SIGINT and SIGTERM only make `over` say so; the block's end, but for an error, delivers them.

    max_minutes  until training has to be over; None: no end
    started      the time.monotonic() these minutes count from (default: now)
    A second signal acts at once.
    """

    def __init__(self, max_minutes: float | None = None, started: float | None = None) -> None:
        started = time.monotonic() if started is None else started
        self.deadline = math.inf if max_minutes is None else started + 60 * max_minutes
        self.received: int | None = None
        self.previous: dict = {}
        self.longest, self.looked = 0.0, math.inf

    def __enter__(self) -> "Session":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self.previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        if self.received is not None and error is None:  # an error, as of a save that failed, is what to know of
            signal.raise_signal(self.received)

    def over(self, reserve: float = 0.0) -> str:
        """Why to stop now, or "". To be asked at every step: twice the longest time between two looks is kept free.

        reserve  seconds that stopping itself takes
        """
        now = time.monotonic()
        self.longest, self.looked = max(self.longest, now - self.looked), now
        if self.received is not None:
            return signal.Signals(self.received).name
        return "the time is up" if now + 2 * self.longest + reserve > self.deadline else ""
