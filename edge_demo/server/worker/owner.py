"""A thread that owns an engine, which works until it is closed."""

from __future__ import annotations

import threading
import time


class BusyError(Exception):
    """Too many requests wait already."""


class ClosedError(Exception):
    """The worker takes no more requests."""


class EngineOwner:
    """A worker's thread; what it does is `_work`, which ends when `_closing` is set.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._closing = False
        self._since = 0.0  # when the present step began
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """End when all jobs have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive()

    @property
    def stalled_s(self) -> float:
        """Seconds since it began its present step; 0 while it has nothing to do."""
        return time.monotonic() - self._since if self._since else 0.0

    def _check_open(self) -> None:
        """Refuse new jobs at the end; called while `_changed` is held.

        Raises:
            ClosedError: it is being closed.
        """
        if self._closing or not self._thread.is_alive():
            raise ClosedError

    def _work(self) -> None:
        raise NotImplementedError
