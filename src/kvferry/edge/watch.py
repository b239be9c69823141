"""Notices that a cloud which should say something every few seconds says nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

SILENT_BEATS = 5
"""A connection on which so many beats are missing is given up."""


class Heard(Protocol):
    """What is watched; see :class:`kvferry.edge.call.Replies`."""

    beat_seconds: float
    waiting_since: float


class Watch:
    """Ends the calls of one question that fall silent, one after the other.

    It begins to look when the cloud has promised beats, and waits for as long as the edge itself does not listen.

    Attributes
    ----------
    silent : bool
        The present call was ended for its silence.
    """

    def __init__(self, heard: Heard) -> None:
        self.silent = False
        self._heard = heard
        self._closed = threading.Event()
        self._stop: Callable[[], object] = lambda: None
        self._thread: threading.Thread | None = None

    @property
    def seconds(self) -> float:
        """How long a silence is borne."""
        return SILENT_BEATS * self._heard.beat_seconds

    def over(self, stop: Callable[[], object]) -> None:
        """Watch this call from now on; ``stop`` ends it."""
        self.silent, self._stop = False, stop
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="kvferry-watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more, and end the call."""
        self._closed.set()
        self._stop()

    def _look(self) -> None:
        while not self._closed.wait(max(self._heard.beat_seconds, 1.0) / 2):
            since = self._heard.waiting_since
            if self.seconds and since and time.monotonic() - since > self.seconds and not self.silent:
                self.silent = True
                self._stop()
