"""Who is there, since when they have been silent, and what each of them may send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvferry.coordinator.capacity import Capacity
from kvferry.link import Rate
from kvferry.modes import BusyError
from kvferry.policy.allocation import Agent, Allocator, allocate

SAFETY = 0.8
"""Of the capacity that points are chosen by; all of it is shared out, so that each has the rest as its margin."""
NOTABLE = 0.02
"""A rate that changes by a smaller part is not worth a message."""
RECENT_SECONDS = 2.0
"""Reports older than that say nothing of now."""
MAX_MEMBERS = 64


@dataclass(frozen=True)
class Share:
    """What one agent may do.

    Parameters
    ----------
    version : int
        Goes up with every change.
    bits_per_second : float
        0 where there is no room for it.
    mode : str
        What is counted on; empty where none fits.
    members : int
        Who share the link.
    """

    version: int = 0
    bits_per_second: float = 0.0
    mode: str = ""
    members: int = 0


class Member:
    """One agent that has joined.

    Parameters
    ----------
    notify : callable
        Called when its share has changed, and when its lease has run out.
    """

    def __init__(self, agent: Agent, now: float, notify: Callable[[], None]) -> None:
        self.agent = agent
        self.notify = notify
        self.share = Share()
        self.gone = False
        self.heard_at = self.reported_at = now
        self.rate = 0.0
        self.slow = False


class Roster:
    """The agents of one uplink, for one thread.

    Parameters
    ----------
    lease_seconds : float
        Who is silent for so long is a member no more.
    clock : callable
        Seconds that only go forward, from about 0 on.
    """

    def __init__(
        self, allocator: Allocator, capacity: Capacity, lease_seconds: float, clock: Callable[[], float]
    ) -> None:
        self.capacity = capacity
        self.lease_seconds = lease_seconds
        self.members: list[Member] = []
        self._allocator = allocator
        self._clock = clock

    def join(self, agent: Agent, notify: Callable[[], None]) -> Member:
        """Take an agent in, and share the link out anew.

        Raises
        ------
        BusyError
            There are as many as one coordinator takes.
        """
        if len(self.members) >= MAX_MEMBERS:
            raise BusyError(f"{MAX_MEMBERS} agents share this uplink already; start a coordinator for another one")
        member = Member(agent, self._clock(), notify)
        self.members.append(member)
        self._share_out()
        return member

    def change(self, member: Member, agent: Agent) -> None:
        """Its circumstances are others now."""
        member.agent, member.heard_at = agent, self._clock()
        self._share_out()

    def hear(self, member: Member, nbytes: int, seconds: float, slow: bool) -> None:
        """Renew a lease, and note what the link did: bytes acknowledged while some were under way for ``seconds``."""
        member.heard_at = self._clock()
        if seconds > 0:
            member.reported_at = member.heard_at
            member.rate, member.slow = 8 * nbytes / seconds, slow

    def leave(self, member: Member) -> None:
        """It has gone; the others get what it had."""
        if member in self.members:
            self.members.remove(member)
            self._share_out()

    def tick(self) -> None:
        """Twice a second: drop whose lease has run out, learn about the link, share out."""
        now = self._clock()
        for member in [x for x in self.members if now - x.heard_at > self.lease_seconds]:
            self.members.remove(member)
            member.gone = True
            member.notify()
        recent = [x for x in self.members if now - x.reported_at <= RECENT_SECONDS]
        self.capacity.hear(now, sum(x.rate for x in recent), any(x.slow for x in recent))
        for member in recent:
            member.slow = False  # told once
        self._share_out()

    def _share_out(self) -> None:
        if not self.members:
            return
        rate = Rate(SAFETY * self.capacity.at(self._clock()))
        grants = allocate(self._allocator, [member.agent for member in self.members], rate)
        for member, grant in zip(self.members, grants, strict=True):
            old, mode = member.share, "" if grant.point is None else grant.point.mode
            bits = grant.bits_per_second / SAFETY
            changed = abs(bits - old.bits_per_second) > NOTABLE * old.bits_per_second or mode != old.mode
            if changed or not old.version or old.members != len(self.members):
                member.share = Share(old.version + 1, bits, mode, len(self.members))
                member.notify()
