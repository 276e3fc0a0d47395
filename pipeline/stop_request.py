"""SIGTERM and Ctrl-C, noted instead of obeyed at once."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

_FORWARDED_S = 1.0


class StopRequest:
    """While entered, notes the signals by which a scheduler or a user announces the end of the job.

    Another Ctrl-C acts at once, unless it comes within a second; another SIGTERM does not. Launchers forward
    both, which also arrive directly. Outside the main thread, where Python cannot handle signals, nothing is
    noted.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = signals
        self._previous: dict[signal.Signals, Any] = {}
        self.signal: signal.Signals | None = None
        self._noted = 0.0

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now, self._noted = time.monotonic(), self._noted or time.monotonic()
        if number == signal.SIGINT and now > self._noted + _FORWARDED_S:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
