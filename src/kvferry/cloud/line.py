"""The bounded line before the model: who gets a place, and when the others should come again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvferry.modes import BusyError

NEWEST = 0.3
"""Weight of the newest answer in what answers usually take."""
SOONEST, LATEST = 0.05, 10.0
"""Seconds that a hint may say."""


@dataclass(eq=False)
class Place:
    """A place in the line, from a question's start to the end of its answer."""

    identity: str
    taken_at: float


class Line:
    """Places for questions that bring their bytes, wait, or are being answered.

    Who comes when all places are taken is told so before bringing anything, with a time to come again; for a while
    after that time it counts as one of those who want a place. Who comes later does not overtake it: of the places that
    fall free, as many as the model does not need at once are kept for those who were refused before. Where several
    edges want places, each may have its equal share of them, so that one that asks much cannot keep the others out.

    Parameters
    ----------
    places : int
    together : int
        How many of them are worked on at once.
    """

    def __init__(self, places: int, together: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places, self._together, self._clock = places, together, clock
        self._kept = max(places - together, 0)
        self._taken: set[Place] = set()
        self._outside: dict[str, float] = {}
        self._usual_seconds = 0.0

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def queue_seconds(self) -> float:
        """How long a question that came now would wait: for those present, at what an answer usually takes."""
        return max(len(self._taken) + 1 - self._together, 0) * self._usual_seconds / self._together

    def enter(self, identity: str) -> Place:
        """A place for a question of this edge.

        Raises
        ------
        BusyError
            There is none, with :attr:`BusyError.retry_seconds`.
        """
        now = self._clock()
        self._outside = {who: until for who, until in self._outside.items() if until > now}
        before = list(self._outside)
        ahead = before.index(identity) if identity in before else len(before)
        mine = Counter(place.identity for place in self._taken)
        others = (mine.keys() | self._outside.keys()) - {identity}
        too_many = self._outside.keys() - {identity} and mine[identity] >= max(1, self._places // (len(others) + 1))
        if too_many or self._places - len(self._taken) <= min(ahead, self._kept):
            wait = min(max((ahead + 1) * self._usual_seconds / self._together, SOONEST), LATEST)
            self._outside[identity] = now + 2 * wait + 1.0  # who is there already keeps its rank
            raise BusyError(f"{len(self._taken)} questions are before this one; try again in {wait:.2g} s", wait)
        self._outside.pop(identity, None)
        place = Place(identity, now)
        self._taken.add(place)
        return place

    def leave(self, place: Place, worked_seconds: float = 0.0) -> None:
        """Give a place back; once is enough. ``worked_seconds`` is how long the model had to do with it."""
        if place in self._taken:
            self._taken.discard(place)
            if worked_seconds:
                self._usual_seconds = NEWEST * worked_seconds + (1 - NEWEST) * (self._usual_seconds or worked_seconds)
