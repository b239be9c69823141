"""How many questions are open, whose they are, and what each caller has used up."""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol
from urllib.parse import unquote

from kvferry.cloud.limits import Limits
from kvferry.errors import KVFerryError
from kvferry.modes import BusyError
from kvferry.security.tokens import Caller
from kvferry.wire.faults import EndingError, QuotaError

MINUTE = 60.0
SILENT_SECONDS = 1.0
"""An open question whose bytes stay away for so long gives its place to one that comes, where there is none left."""


class Question(Protocol):
    """One that is open, by whatever way it came: a :class:`~kvferry.cloud.passage.Passage`, or a request by HTTP.

    Attributes
    ----------
    complete : bool
        All of it has come.
    heard_at : float
        When the last byte came, by the monotonic clock.
    """

    caller: Caller
    peer: str
    complete: bool
    heard_at: float

    @property
    def attached(self) -> bool:
        """Whether anybody waits for its answer now."""
        ...

    def end(self, error: KVFerryError | None = None) -> None:
        """Stop the work on it at once; ``error`` is its last reply."""
        ...


class Quota:
    """So much a minute: a bucket that holds what one minute gives, and fills up all the time. It may be overdrawn by
    what could not be known beforehand, and then nothing more is given until that is made up for."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left, self._at = per_minute, clock()

    def take(self, amount: float) -> None:
        """Use some up."""
        self._fill()
        self._left -= amount

    @property
    def wait_seconds(self) -> float:
        """Until there is some; 0 where there is."""
        self._fill()
        return 0.0 if self._left > 0 else MINUTE * (1e-9 - self._left / self._per_minute)

    def _fill(self) -> None:
        now = self._clock()
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / MINUTE)
        self._at = now


class Admission:
    """Lets questions in.

    Parameters
    ----------
    limits : Limits
        ``calls`` and ``peer_calls``.

    Attributes
    ----------
    ending : bool
        Nobody is let in any more.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.ending = False
        self._open: set[Question] = set()
        self._quotas: dict[tuple[str, str, float], Quota] = {}

    @property
    def open(self) -> frozenset[Question]:
        """Questions that the service works on."""
        return frozenset(self._open)

    def admit(self, caller: Caller, peer: str) -> None:
        """Make sure that there is room for one more question of this caller.

        Raises
        ------
        BusyError
            There is none, of all or of what this caller or machine may have.
        QuotaError
            The caller has used up what it may in a minute.
        EndingError
            The cloud is shutting down.
        """
        if self.ending:
            raise EndingError("the cloud is shutting down; ask again, or ask another")
        self.check(caller)
        whose = _whose(caller, peer)
        most = caller.calls or (None if not caller.owner and _local(peer) else self._limits.peer_calls)
        if most is not None and sum(_whose(x.caller, x.peer) == whose for x in self._open) >= most:
            raise BusyError(f"{most} questions of this edge are open, as many as it may have; wait for one to end", 0.0)
        if len(self._open) >= self._limits.calls and not self._make_room():
            raise BusyError(f"{len(self._open)} questions are open, as many as there may be; try again in a while")

    def add(self, passage: Question) -> None:
        """It is open from now on."""
        self._open.add(passage)

    def drop(self, passage: Question) -> None:
        """The service is done with it."""
        self._open.discard(passage)

    def check(self, caller: Caller) -> None:
        """QuotaError where the caller has used up what it may."""
        for what in ("bytes", "model_seconds"):
            quota = self._quota(caller, what)
            if quota is not None and (wait := quota.wait_seconds):
                most = getattr(caller, f"{what}_per_minute")
                raise QuotaError(
                    f"{caller.name} may have {most:g} {what.replace('_', ' ')} a minute; ask again in {wait:.1f} s",
                    wait_seconds=wait,
                )

    def pay(self, caller: Caller, what: str, amount: float) -> None:
        """Count what a caller uses up."""
        if (quota := self._quota(caller, what)) is not None:
            quota.take(amount)

    def _quota(self, caller: Caller, what: str) -> Quota | None:
        most = getattr(caller, f"{what}_per_minute")
        if most is None:
            return None
        return self._quotas.setdefault((caller.owner, what, most), Quota(most))

    def _make_room(self) -> bool:
        """End the open question that is silent for longest, of those who have most of them."""
        now = time.monotonic()
        silent = [x for x in self._open if not x.attached or (not x.complete and now - x.heard_at > SILENT_SECONDS)]
        if not silent:
            return False
        count = Counter(_whose(x.caller, x.peer) for x in silent)
        last = max(silent, key=lambda x: (not x.attached, count[_whose(x.caller, x.peer)], now - x.heard_at))
        last.end(BusyError("other questions needed the place of this one, from which nothing came; ask again"))
        self._open.discard(last)
        return True


def _whose(caller: Caller, peer: str) -> str:
    return caller.owner or peer


def _local(peer: str) -> bool:
    """Whether all that is known of a peer is that it is on this machine, or comes through a tunnel or proxy on it."""
    host = unquote(peer.partition(":")[2]).strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return peer.startswith("unix")
