"""Who is there, since when they have been silent, and what each of them may send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvferry.coordinator.capacity import Capacity
from kvferry.link import Rate
from kvferry.link.estimate import LEAST
from kvferry.policy.allocation import Agent, Allocator, Grant, allocate, reserve
from kvferry.wire.faults import BusyError

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
    resting : bool
        For want of questions it is only what a fallback takes.
    """

    version: int = 0
    bits_per_second: float = 0.0
    mode: str = ""
    members: int = 0
    resting: bool = False


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
        self.gone = self.asking = self.resting = False
        self.heard_at = self.reported_at = self.asked_at = now
        self.rate = 0.0
        self.slow = False


class Roster:
    """The agents of one uplink, for one thread.

    Parameters
    ----------
    lease_seconds : float
        Who is silent for so long is a member no more.
    idle_seconds : float
        Who asks nothing for so long rests.
    clock : callable
        Seconds that only go forward, from about 0 on.
    """

    def __init__(
        self,
        allocator: Allocator,
        capacity: Capacity,
        lease_seconds: float,
        idle_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.capacity = capacity
        self.lease_seconds = lease_seconds
        self._idle_seconds = idle_seconds
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
        self._ask(member)
        self._share_out()

    def hear(self, member: Member, nbytes: int, seconds: float, slow: bool, asking: bool = False) -> None:
        """Renew a lease, and note what the link did: bytes acknowledged while some were under way for ``seconds``.

        Who rested and asks again, or sends without having said so, has its share at once.
        """
        member.heard_at = self._clock()
        if seconds > 0:
            member.reported_at = member.heard_at
            member.rate, member.slow = 8 * nbytes / seconds, slow
        ended, member.asking = member.asking and not asking, asking
        if (asking or ended or seconds > 0) and self._ask(member):
            self._share_out()

    def leave(self, member: Member) -> None:
        """It has gone; the others get what it had."""
        if member in self.members:
            self.members.remove(member)
            self._share_out()

    def tick(self) -> None:
        """Twice a second: drop whose lease has run out, let rest who asks nothing, learn about the link, share out."""
        now = self._clock()
        for member in [x for x in self.members if now - x.heard_at > self.lease_seconds]:
            self.members.remove(member)
            member.gone = True
            member.notify()
        for member in self.members:
            member.resting = not member.asking and now - member.asked_at > self._idle_seconds
        recent = [x for x in self.members if now - x.reported_at <= RECENT_SECONDS]
        self.capacity.hear(now, sum(x.rate for x in recent), any(x.slow for x in recent))
        for member in recent:
            member.slow = False  # told once
        self._share_out()

    def _ask(self, member: Member) -> bool:
        """It has a question; whether it rested before."""
        rested, member.resting, member.asked_at = member.resting, False, self._clock()
        return rested

    def _share_out(self) -> None:
        for member, grant in self._grants():
            old, mode = member.share, "" if grant.point is None else grant.point.mode
            bits = grant.bits_per_second / SAFETY
            changed = abs(bits - old.bits_per_second) > NOTABLE * old.bits_per_second
            new = Share(old.version, bits, mode, len(self.members), member.resting)
            if changed or not old.version or new != replace(old, bits_per_second=bits):
                member.share = replace(new, version=old.version + 1)
                member.notify()

    def _grants(self) -> Iterator[tuple[Member, Grant]]:
        """Fallbacks for those that rest, after the fallbacks of those that ask, which share what is left."""
        asking = [member for member in self.members if not member.resting]
        resting = [member for member in self.members if member.resting]
        left = SAFETY * self.capacity.at(self._clock())
        first = sum(grant.bits_per_second for grant in reserve([x.agent for x in asking], left)) if asking else 0.0
        if resting:
            grants = reserve([member.agent for member in resting], left - first)
            left -= sum(grant.bits_per_second for grant in grants)
            yield from zip(resting, grants, strict=True)
        if asking:
            agents = [member.agent for member in asking]
            yield from zip(asking, allocate(self._allocator, agents, Rate(max(left, LEAST))), strict=True)
