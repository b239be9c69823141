"""A total shared out among layers, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvferry.errors import BudgetError


def check_room(keep: float, length: int, least: int) -> None:
    """Refuse ``keep`` tokens per layer of a prompt that must keep ``least``."""
    if keep < least:
        works = min(math.ceil(1000 * least / length) / 1000, 1.0)
        raise BudgetError(
            f"{keep:g} of {length} tokens per layer are too few for the {least} that must stay; the smallest fraction "
            f"that works for this prompt is {works:g}",
            works,
        )


def share_out(weights: Sequence[float], fraction: float, length: int, least: int) -> list[int]:
    """Whole tokens per layer in proportion to ``weights``, each between ``least`` and ``length``.

    They sum up to ``round(fraction * length * layers)``: the common factor is found by bisection, so that what one
    layer cannot take (or must have) the others share, and fractions are rounded by largest remainder.
    """
    layers = len(weights)
    total = max(layers, math.floor(fraction * length * layers + 0.5))
    check_room(total / layers, length, least)
    positive = [max(weight, 1e-9) for weight in weights]
    low, high = 0.0, length / min(positive)
    for _ in range(100):
        middle = (low + high) / 2
        wanted = [min(max(middle * weight, least), length) for weight in positive]
        low, high = (middle, high) if sum(wanted) < total else (low, middle)
    return _rounded(wanted, total, length)


def _rounded(wanted: Sequence[float], total: int, most: int) -> list[int]:
    """Largest remainder: whole numbers nearest to ``wanted`` that sum up to ``total``."""
    counts = [math.floor(x) for x in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - wanted[i])
    for i in [i for i in by_remainder if counts[i] < most][: total - sum(counts)]:
        counts[i] += 1
    return counts
