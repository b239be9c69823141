"""Many agents, one uplink: what each could send, and what an allocation is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvferry.errors import InputError
from kvferry.link.trace import Array
from kvferry.policy.points import FALLBACKS, OperatingPoint
from kvferry.policy.situation import Context, Indices, situation

ROUNDING = 1 + 1e-12
"""What just fits still fits when it is added up in another order."""


@dataclass(frozen=True)
class Agent:
    """An edge that asks now: its points and its question's circumstances."""

    name: str
    points: tuple[OperatingPoint, ...]
    context: Context


@dataclass(frozen=True)
class Grant:
    """What one agent may do. ``point`` is None where the link has no room for it: it is refused at once."""

    agent: Agent
    point: OperatingPoint | None
    bits_per_second: float


@dataclass(frozen=True, eq=False)
class Options:
    """Agents as arrays, ``[agents, P]``, tables filled up to the longest with points that never fit.

    Parameters
    ----------
    needed : float64 array
        Bits per second that bring each point in just in time; inf where no rate does, or it is not allowed.
    quality, nbytes : float64 array
    fallback : int64 ``[agents]``
        The fallback (``scout``, ``prompt``, ``local``) that asks least, -1 where there is none in time.
    """

    needed: Array
    quality: Array
    nbytes: Array
    fallback: Indices

    @classmethod
    def of(cls, agents: Sequence[Agent]) -> Options:
        """Arrays for agents.

        Raises
        ------
        InputError
            There are none, or one has no points.
        """
        if not agents or not all(agent.points for agent in agents):
            raise InputError("an allocation needs at least one agent, and each agent at least one point")
        width = max(len(agent.points) for agent in agents)
        needed = np.full((len(agents), width), np.inf)
        quality, nbytes = np.zeros_like(needed), np.zeros_like(needed)
        last = np.zeros_like(needed, bool)
        for row, agent in enumerate(agents):
            now, count = situation(agent.points, agent.context), len(agent.points)
            needed[row, :count], quality[row, :count], nbytes[row, :count] = now.needed, now.quality, now.nbytes
            last[row, :count] = [point.kind in FALLBACKS for point in agent.points]
        cost = np.where(last, needed, np.inf)
        return cls(needed, quality, nbytes, np.where(np.isfinite(cost.min(1)), cost.argmin(1), -1))

    @property
    def reserve(self) -> Array:
        """Bits per second that each agent's fallback takes, 0 where it has none: ``[agents]``."""
        least = self.needed[np.arange(len(self.fallback)), np.maximum(self.fallback, 0)]
        return np.where(self.fallback >= 0, least, 0.0)

    @property
    def usable(self) -> Array:
        """Which points some rate brings in time."""
        return np.isfinite(self.needed)

    def admitted(self, budget: Array) -> Array:
        """Whose fallbacks fit together, cheapest first, ``[lanes, agents]``; who has none takes his chance."""
        order = np.argsort(self.reserve, kind="stable")
        fits = np.empty((len(budget), len(order)), bool)
        fits[:, order] = np.cumsum(self.reserve[order])[None] <= ROUNDING * budget[:, None]
        return fits

    def best_within(self, rates: Array) -> Indices:
        """The best point of each agent at rates ``[lanes, agents]``, fewest bits winning a tie; -1 where none fits."""
        ok = self.needed <= rates[..., None]
        value = np.where(ok, self.quality, -1.0)
        tied = ok & (value == value.max(-1, keepdims=True))
        choice = np.where(tied, self.needed, np.inf).argmin(-1)
        return np.where(ok.any(-1), choice, -1)


class Allocator(Protocol):
    """A way of sharing a link out."""

    def share(self, options: Options, budget: Array) -> tuple[Indices, Array]:
        """For budgets ``[lanes]`` in bits per second: points and rates, ``[lanes, agents]`` each; -1 is refused.

        Rates add up to the budget at most. Where the fallbacks of all agents fit together, no agent that has one is
        refused, and every point is in time at its rate.
        """
