"""``max_min``: nobody can get more but by taking from somebody who has less."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.link.trace import Array
from kvferry.policy.allocation.base import Options
from kvferry.policy.allocation.grants import above_reserve
from kvferry.policy.situation import Indices


@dataclass(frozen=True)
class MaxMin:
    """Max-min fair rates (Bertsekas and Gallager, Data Networks, section 6.5.2), after everybody's fallback.

    An agent demands what its best point takes beyond its fallback; what it does not need goes to the others.
    """

    def share(self, options: Options, budget: Array) -> tuple[Indices, Array]:
        """Points and rates, ``[lanes, agents]``."""
        best = options.best_within(np.full((1, len(options.fallback)), np.finfo(float).max))[0]
        wanted = options.needed[np.arange(len(best)), np.maximum(best, 0)]
        demand = np.where(best >= 0, np.maximum(wanted - options.reserve, 0.0), 0.0)
        admitted = options.admitted(budget)
        rest = np.maximum(budget - np.where(admitted, options.reserve, 0.0).sum(1), 0.0)
        return above_reserve(options, budget, water_filled(np.where(admitted, demand, 0.0), rest))


def water_filled(demand: Array, supply: Array) -> Array:
    """Max-min fair parts of ``supply`` ``[lanes]`` for demands ``[lanes, agents]``; what nobody demands is left."""
    lanes, agents = demand.shape
    order = np.argsort(demand, axis=1, kind="stable")
    rising = np.take_along_axis(demand, order, axis=1)
    parts = np.empty_like(demand)
    left = supply.copy()
    for k in range(agents):
        part = np.minimum(rising[:, k], left / (agents - k))
        parts[np.arange(lanes), order[:, k]] = part
        left = left - part
    return parts
