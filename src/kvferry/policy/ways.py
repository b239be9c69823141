"""A policy and what it listens to, as text: ``greedy:0.8@ewma:0.3``, ``static:kv:full|int8``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvferry.errors import InputError
from kvferry.link.estimate import Estimator, Ewma, HarmonicMean, Quantile
from kvferry.link.trace import Array
from kvferry.policy.greedy import Greedy
from kvferry.policy.oracle import Oracle
from kvferry.policy.risk_aware import RiskAware
from kvferry.policy.situation import Indices, Situation
from kvferry.policy.static import Static


class Policy(Protocol):
    """How a point is chosen."""

    def choose(self, now: Situation) -> Indices:
        """Index of a point per lane, -1 where none can be in time."""

    def budget(self, rate: Array, ratios: Array) -> Array:
        """Bits per second that may be shared out among agents, ``[lanes]``, NaN where nothing is known."""


POLICIES: dict[str, Callable[..., Policy]] = {"greedy": Greedy, "risk-aware": RiskAware, "oracle": Oracle}
"""By name; a number after a colon is the first field. ``static:MODE`` takes the rest of the text as it is."""

ESTIMATORS: dict[str, Callable[[float | None, int], Estimator]] = {
    "ewma": lambda alpha, lanes: Ewma(0.3 if alpha is None else alpha, lanes),
    "harmonic": lambda last, lanes: HarmonicMean(5 if last is None else int(last), lanes),
    "quantile": lambda alpha, lanes: Quantile(Ewma(0.3 if alpha is None else alpha, lanes)),
}
"""``quantile:ALPHA`` is the distribution of the errors of ``ewma:ALPHA``."""


@dataclass(frozen=True)
class Way:
    """A policy with its estimator."""

    text: str
    policy: Policy
    estimator: Callable[[int], Estimator]
    """Makes one for so many lanes."""

    @classmethod
    def parse(cls, text: str) -> Way:
        """Read ``POLICY[:NUMBER][@ESTIMATOR[:NUMBER]]`` or ``static:MODE``.

        Raises
        ------
        InputError
            Naming what is not known.
        """
        if text.startswith("static:"):
            return cls(text, Static(text.removeprefix("static:")), lambda lanes: Ewma(lanes=lanes))
        policy, _, estimator = text.partition("@")
        name, number = _named(policy, text)
        if name not in POLICIES or (name == "oracle" and number is not None):
            raise InputError(f"{text!r} is no policy; use {', '.join(POLICIES)} or static:MODE")
        kind, setting = _named(estimator or ("quantile" if name == "risk-aware" else "ewma"), text)
        if kind not in ESTIMATORS:
            raise InputError(f"{text!r} names no estimator; use {', '.join(ESTIMATORS)}")
        ESTIMATORS[kind](setting, 1)
        chosen = POLICIES[name]() if number is None else POLICIES[name](number)
        return cls(text, chosen, lambda lanes: ESTIMATORS[kind](setting, lanes))


def _named(part: str, text: str) -> tuple[str, float | None]:
    name, colon, number = part.partition(":")
    try:
        value = float(number) if colon else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise InputError(f"{text!r}: {number!r} is not a number")
    return name, value
