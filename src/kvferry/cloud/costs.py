"""What a request may cost: memory and decoding time, reserved before they are taken, for all open requests together."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from kvferry.cloud.limits import Limits
from kvferry.errors import CancelledError, InputError
from kvferry.modes import BusyError
from kvferry.patience import looking

HEAVY_BYTES = 32 * 1024 * 1024
HEAVY_SECONDS = 0.2
"""What takes more memory, or has taken more of a processor, is decoded where it keeps nobody else waiting."""
TRIM_BYTES = 32 * 1024 * 1024
"""Memory of this size is given back to the system when its request ends."""


class Budget:
    """The memory that all open requests may take together. Safe to use from several threads.

    Parameters
    ----------
    limits : Limits
        ``memory_bytes``, of which one request may take half, and ``decode_seconds``.
    """

    def __init__(self, limits: Limits) -> None:
        self.memory_bytes = limits.memory_bytes
        self.decode_seconds = limits.decode_seconds
        self._lock = threading.Lock()
        self._taken = 0

    @property
    def taken(self) -> int:
        """Bytes reserved at this moment."""
        return self._taken

    @property
    def most(self) -> int:
        """Bytes that one request may take."""
        return self.memory_bytes // 2

    @contextmanager
    def account(self) -> Iterator[Account]:
        """For one request; what it reserved is given back when it ends, however it ends."""
        account = Account(self)
        try:
            yield account
        finally:
            account.close()
            if account.peak >= TRIM_BYTES:
                give_back()

    def take(self, nbytes: int) -> None:
        """Raises BusyError where other requests have too much of it."""
        with self._lock:
            if self._taken + nbytes > self.memory_bytes:
                raise BusyError(
                    f"open questions take {self._taken:,} of {self.memory_bytes:,} bytes, and this one needs "
                    f"{nbytes:,} more; try again in a while"
                )
            self._taken += nbytes

    def give(self, nbytes: int) -> None:
        """Give back."""
        with self._lock:
            self._taken -= nbytes


class Account:
    """What one request has reserved, and how long its decoding has run.

    Attributes
    ----------
    seconds : float
        Of a processor, spent in :meth:`working`.
    """

    def __init__(self, budget: Budget) -> None:
        self.seconds = 0.0
        self.peak = 0
        self._budget = budget
        self._lock = threading.Lock()
        self._nbytes = 0
        self._open = True
        self._began: float | None = None

    @property
    def nbytes(self) -> int:
        """Reserved now."""
        return self._nbytes

    @property
    def heavy(self) -> bool:
        """Whether its decoding should keep nobody else waiting."""
        return self._nbytes > HEAVY_BYTES or self.seconds > HEAVY_SECONDS

    def reserve(self, nbytes: int) -> None:
        """Before so many bytes are taken; also called between the steps of decoding, which it ends.

        Raises
        ------
        InputError
            No request may take so much memory, or so long to decode.
        BusyError
            Others have the memory now.
        CancelledError
            The request has ended.
        """
        self._check_time()
        with self._lock:
            if not self._open:
                raise CancelledError("the question was called off")
            if self._nbytes + nbytes > self._budget.most:
                raise InputError(
                    f"this question takes {self._nbytes + nbytes:,} bytes of the cloud's memory; at most "
                    f"{self._budget.most:,} are given to one: send less, or smaller pictures"
                )
            self._budget.take(nbytes)
            self._nbytes += nbytes
            self.peak = max(self.peak, self._nbytes)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around a piece of decoding, in the thread that does it."""
        if not self._open:
            raise CancelledError("the question was called off")
        self._began = time.thread_time()
        try:
            with looking(self._look):
                yield
        finally:
            self.seconds += time.thread_time() - self._began
            self._began = None
        self._check_time()

    @property
    def most_seconds(self) -> float:
        """That its decoding may take in all."""
        return self._budget.decode_seconds

    @property
    def seconds_left(self) -> float:
        """Of those."""
        return max(self.most_seconds - self.seconds, 0.0)

    def spend(self, seconds: float) -> None:
        """So many of a processor were used for it elsewhere."""
        self.seconds += seconds

    def close(self) -> None:
        """Give back what was reserved; whatever is still decoded for it ends at its next step."""
        with self._lock:
            self._open = False
            self._budget.give(self._nbytes)
            self._nbytes = 0

    def _look(self) -> None:
        """Between two steps of decoding."""
        if not self._open:
            raise CancelledError("the question was called off")
        self._check_time()

    def _check_time(self) -> None:
        now = 0.0 if self._began is None else time.thread_time() - self._began
        if self.seconds + now > self._budget.decode_seconds:
            raise InputError(
                f"what was sent takes more than {self._budget.decode_seconds:g} s to decode; send less, in fewer "
                "tiers, or by a faster codec"
            )


def give_back() -> None:
    """Return what a large request leaves to the system."""
    gc.collect()
    trim()


def trim() -> None:
    """Return freed memory to the system, where its allocator would keep it."""
    with suppress(AttributeError, OSError):
        _libc().malloc_trim(0)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
