"""``marginal``: the next byte goes where it buys most quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.link.trace import Array
from kvferry.policy.allocation.base import ROUNDING, Options
from kvferry.policy.allocation.quality import spread
from kvferry.policy.situation import Indices


@dataclass(frozen=True)
class Marginal:
    """Greedy for the multiple-choice knapsack: upgrades in falling order of quality gained per bit per second.

    Everybody starts with what asks least; only upgrades on the upper hull of an agent's points are considered, the
    classical heuristic (Sinha and Zoltners, Operations Research 27, 1979). One that does not fit is passed over, and
    so are that agent's later ones.
    """

    def share(self, options: Options, budget: Array) -> tuple[Indices, Array]:
        """Points and rates, ``[lanes, agents]``."""
        choice, spent = _start(options, budget)
        upgrades = sorted(
            (step for row in range(len(options.needed)) for step in _hull(options, row)), key=lambda step: -step[3]
        )
        for row, before, after, _ in upgrades:
            more = options.needed[row, after] - options.needed[row, before]
            takes = (choice[:, row] == before) & (spent + more <= ROUNDING * budget)
            choice[takes, row] = after
            spent = np.where(takes, spent + more, spent)
        return choice, spread(options, choice, budget)


def _start(options: Options, budget: Array) -> tuple[Indices, Array]:
    """Everybody's cheapest point, those that ask least first, as far as they fit together."""
    least = options.needed.min(1)
    order = np.argsort(least, kind="stable")
    fits = np.empty((len(budget), len(least)), bool)
    fits[:, order] = np.cumsum(least[order])[None] <= ROUNDING * budget[:, None]
    cheapest = np.lexsort((-options.quality, options.needed), axis=1)[:, 0]
    return np.where(fits, cheapest, -1), np.where(fits, least, 0.0).sum(1)


def _hull(options: Options, row: int) -> list[tuple[int, int, int, float]]:
    """Steps up an agent's upper hull: (agent, from, to, quality per bit per second), in falling order of the last."""
    cost, quality = options.needed[row], options.quality[row]
    at = int(np.lexsort((-quality, cost))[0])
    steps: list[tuple[int, int, int, float]] = []
    while True:
        dearer = np.isfinite(cost) & (cost > cost[at]) & (quality > quality[at])
        if not dearer.any():
            return steps
        slope = np.full(len(cost), -np.inf)
        slope[dearer] = (quality[dearer] - quality[at]) / (cost[dearer] - cost[at])
        up = int(slope.argmax())
        steps.append((row, at, up, float(slope[up])))
        at = up
