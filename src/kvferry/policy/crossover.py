"""At which bandwidth one way of asking overtakes another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvferry.policy.points import OperatingPoint
from kvferry.policy.situation import Context


@dataclass(frozen=True)
class Crossover:
    """Where a point is faster than another: ``always``, ``never``, or at rates ``below`` or ``above`` a bound.

    Parameters
    ----------
    when : {"always", "never", "below", "above"}
    bits_per_second : float or None
        The bound, where there is one.
    """

    when: Literal["always", "never", "below", "above"]
    bits_per_second: float | None = None

    def __str__(self) -> str:
        if self.bits_per_second is None:
            return {"always": "faster at every rate", "never": "slower at every rate"}[self.when]
        return f"faster {self.when} {self.bits_per_second / 1e6:.4g} Mbit/s"


def crossover(point: OperatingPoint, other: OperatingPoint, context: Context) -> Crossover:
    """Compare ``T`` of two points over all rates.

    From ``fixed + 8 S / B`` on both sides: a point that sends more wins above ``B = 8 (S - S_other) / (fixed_other -
    fixed)``, one that sends less wins below it, if what it computes is dearer; else always.
    """
    more_bits = 8 * (point.nbytes - other.nbytes)
    saved = context.fixed_seconds(other) - context.fixed_seconds(point)
    if more_bits > 0:
        return Crossover("above", more_bits / saved) if saved > 0 else Crossover("never")
    if more_bits < 0:
        return Crossover("below", more_bits / saved) if saved < 0 else Crossover("always")
    return Crossover("always" if saved > 0 else "never")
