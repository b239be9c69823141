"""Which widths do least harm within a budget of bytes: an exact multiple-choice knapsack."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvferry.errors import BudgetError

Ints = npt.NDArray[np.int64]


def allocate(costs: Ints, damage: npt.NDArray[np.float64], budget: int) -> Ints:
    """One choice per cell with the least summed damage whose summed cost is within the budget.

    A dynamic program over the cells. Its states are the partial sums that nothing beats: no other costs as little and
    harms as little. So the result is an optimum, whatever the numbers are; many cells have the same costs, which keeps
    states few.

    Parameters
    ----------
    costs : int64 ``[cells, choices]``
    damage : float64 ``[cells, choices]``
    budget : int

    Returns
    -------
    int64 ``[cells]``
        Indices of choices.

    Raises
    ------
    BudgetError
        Not even the cheapest choices fit.
    """
    cheapest = costs.min(1)
    later = cheapest.sum() - cheapest.cumsum()
    if cheapest.sum() > budget:
        raise BudgetError(f"the least that can be chosen costs {cheapest.sum()}, more than the budget of {budget}")
    cost, harm = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    for cell_costs, cell_damage, rest in zip(costs, damage, later, strict=True):
        sums, harms = (np.add.outer(*pair).reshape(-1) for pair in ((cost, cell_costs), (harm, cell_damage)))
        order = np.lexsort((harms, sums))
        order = order[sums[order] + rest <= budget]
        before = np.minimum.accumulate(np.concatenate([[np.inf], harms[order]]))[:-1]
        kept = order[harms[order] < before]
        trail.append((kept // costs.shape[1], kept % costs.shape[1]))
        cost, harm = sums[kept], harms[kept]
    state, choices = len(cost) - 1, []
    for parents, chosen in reversed(trail):
        choices.append(chosen[state])
        state = parents[state]
    return np.array(choices[::-1], np.int64)
