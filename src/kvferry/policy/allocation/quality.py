"""``quality``: the most quality in all that a link can carry, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.link.trace import Array
from kvferry.policy.allocation.base import ROUNDING, Options
from kvferry.policy.situation import Indices

GRID = 1e-4
"""Differences in quality below this are none: it bounds the number of combinations that must be kept."""


@dataclass(frozen=True)
class Quality:
    """Multiple-choice knapsack, solved for every budget at once by Pareto dynamic programming.

    Nemhauser and Ullmann (Management Science 15, 1969): agents are added one at a time, and of the combinations only
    those are kept that no other beats in both rate and value. First the number of agents that are served counts, then
    their quality to 1e-4; so nobody is refused in favour of somebody else's better answer. What is left of the
    budget is shared out in proportion to what the chosen points need.
    """

    def share(self, options: Options, budget: Array) -> tuple[Indices, Array]:
        """Points and rates, ``[lanes, agents]``."""
        needed, choices = frontier(options)
        choice = choices[np.searchsorted(needed, ROUNDING * budget, side="right") - 1]
        return choice, spread(options, choice, budget)


def frontier(options: Options) -> tuple[Array, Indices]:
    """Every combination that some budget makes the best: total bits per second, rising, and points ``[k, agents]``."""
    agents = len(options.needed)
    served = 1.0 + np.round(options.quality.max() / GRID) * agents
    needed, value, steps = np.zeros(1), np.zeros(1), []
    for row in range(agents):
        points = np.flatnonzero(np.isfinite(options.needed[row]))
        gain = np.append(0.0, served + np.round(options.quality[row, points] / GRID))
        cost = np.append(0.0, options.needed[row, points])
        all_needed = (needed[:, None] + cost).ravel()
        all_value = (value[:, None] + gain).ravel()
        order = np.lexsort((-all_value, all_needed))
        best_before = np.maximum.accumulate(np.append(-1.0, all_value[order]))[:-1]
        kept = order[all_value[order] > best_before]
        steps.append((kept // len(cost), np.append(-1, points)[kept % len(cost)]))
        needed, value = all_needed[kept], all_value[kept]
    choices = np.empty((len(needed), agents), np.int64)
    at = np.arange(len(needed))
    for row in reversed(range(agents)):
        parent, chosen = steps[row]
        choices[:, row] = chosen[at]
        at = parent[at]
    return needed, choices


def spread(options: Options, choice: Indices, budget: Array) -> Array:
    """The whole budget in proportion to what the chosen points need, ``[lanes, agents]``."""
    needs = options.needed[np.arange(choice.shape[1]), np.maximum(choice, 0)]
    needs = np.where(choice >= 0, needs, 0.0)
    total = needs.sum(1, keepdims=True)
    scale = np.divide(budget[:, None], total, out=np.ones_like(total), where=total > 0)
    rates: Array = needs * scale
    return rates
