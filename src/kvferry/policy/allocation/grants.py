"""One round: what every agent is granted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvferry.link.rate import Rate
from kvferry.link.trace import Array
from kvferry.policy.allocation.base import ROUNDING, Agent, Allocator, Grant, Options
from kvferry.policy.situation import Indices


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
