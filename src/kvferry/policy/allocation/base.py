"""Many agents, one uplink: what each could send, and what an allocation is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvferry.errors import InputError
from kvferry.link.rate import Rate
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


def above_reserve(options: Options, budget: Array, shares: Array) -> tuple[Indices, Array]:
    """Reserve the admitted agents' fallbacks, share out the rest, then let each agent take its best.

    Parameters
    ----------
    shares : float64 ``[lanes or 1, agents]``
        How the rest is shared; need not add up to 1.
    """
    admitted = options.admitted(budget)
    reserved = np.where(admitted, options.reserve, 0.0)
    rest = np.maximum(budget - reserved.sum(1), 0.0)
    weights = np.where(admitted, shares, 0.0)
    total = weights.sum(1, keepdims=True)
    rates = reserved + rest[:, None] * np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    choice = np.where(admitted, options.best_within(ROUNDING * rates), -1)
    return choice, rates


def allocate(allocator: Allocator, agents: Sequence[Agent], rate: Rate) -> tuple[Grant, ...]:
    """Share a link of ``rate`` among agents; one grant per agent, in their order.

    Raises
    ------
    InputError
        There are no agents, or one has no points.
    """
    choice, rates = allocator.share(Options.of(agents), np.array([rate.bits_per_second]))
    return tuple(
        Grant(agent, agent.points[index] if index >= 0 else None, float(bits))
        for agent, index, bits in zip(agents, choice[0], rates[0], strict=True)
    )


def reserve(agents: Sequence[Agent], bits_per_second: float) -> tuple[Grant, ...]:
    """What each agent's fallback takes and no more, cheapest first as long as they fit; one grant per agent.

    Raises
    ------
    InputError
        There are no agents, or one has no points.
    """
    options = Options.of(agents)
    fits = options.admitted(np.array([bits_per_second]))[0] & (options.fallback >= 0)
    each = zip(agents, options.fallback, np.where(fits, options.reserve, 0.0), fits, strict=True)
    return tuple(Grant(agent, agent.points[index] if fit else None, float(bits)) for agent, index, bits, fit in each)
