"""``risk-aware``: expected quality under the forecast's own error, with a bound on the chance of being late."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.errors import InputError
from kvferry.link.estimate import LEAST, below, lower_bound
from kvferry.link.trace import Array
from kvferry.policy.situation import Indices, Situation

_ALIKE = 0.005
"""Points whose expected quality differs by less than this part of it count as equal."""
_ROUNDING = 1e-9
"""Shares are quotients: the same first bytes of two points may differ by that much."""


@dataclass(frozen=True)
class RiskAware:
    """``argmax E[quality(m) in time]`` subject to ``P(m late) <= epsilon``, with hysteresis.

    After Fugu (Yan et al., NSDI 2020), with a deadline in place of a playback buffer. A point is late when the next
    rate is below what it needs (a cache in tiers or in steps: what its first usable share needs, and more of it is
    worth what was measured of it); the chance comes from past ratios of actual to predicted rates. Where no point keeps
    the bound, as before ``1 / epsilon - 1`` ratios have been seen and where there is no fallback, expected quality
    alone decides; where nothing is known, the point that asks least of the link is taken.

    Some dozens of ratios cannot tell a chance of 1 % from none. So points that promise the best but for 0.5 % are taken
    as equal, and of these the one wins whose first usable share asks least of the link.

    Parameters
    ----------
    epsilon : float
    gain : float
        The last choice stays while it is allowed, no other promises so much more expected quality, and its first usable
        share asks no more of the link than that of the one it would give way to.
    """

    epsilon: float = 0.1
    gain: float = 0.01

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < 1 and self.gain >= 0):
            raise InputError("epsilon is a chance between 0 and 1, the gain 0 or more")

    def choose(self, now: Situation) -> Indices:
        """Index of a point per lane, -1 where none can be in time."""
        if now.ratios.shape[1] == 0 and not np.isnan(now.rate).all():
            raise InputError("a risk-aware policy needs a forecast with its error; use the estimator quantile")
        late, expected = self._foretold(now)
        safe = (late <= self.epsilon) & np.isfinite(now.needed)
        ok = np.where(safe.any(axis=1, keepdims=True), safe, (late < 1) & np.isfinite(now.needed))
        most = np.where(ok, expected, 0.0).max(axis=1, keepdims=True)
        first = now.needed_for(now.shares[..., 0])
        alike = ok & (expected >= (1 - _ALIKE) * most)
        least = np.where(alike, first, np.inf).min(axis=1, keepdims=True)
        modest = first <= least * (1 + _ROUNDING)
        best = now.best(alike & modest, expected)
        rows, last = np.arange(len(best)), np.maximum(now.last, 0)
        stays = (now.last >= 0) & (ok & modest & (most - expected <= self.gain))[rows, last]
        return np.where(stays, last, best)

    def budget(self, rate: Array, ratios: Array) -> Array:
        """What the link falls short of with a chance of ``epsilon``, ``[lanes]``; NaN where that is not known yet."""
        return rate * lower_bound(ratios, self.epsilon)

    def _foretold(self, now: Situation) -> tuple[Array, Array]:
        """Chance that no answer is in time, and what one is worth on average, ``[lanes, P]``."""
        first, expected = np.empty(0), np.zeros(now.needed.shape)
        rate = np.maximum(np.nan_to_num(now.rate), LEAST)[:, None]
        for step in range(now.shares.shape[-1]):
            needed = now.needed_for(now.shares[..., step])
            late = np.where(needed == 0, 0.0, below(now.ratios, needed / rate))
            first = late if step == 0 else first
            expected = expected + now.gains[..., step] * (1 - late)
        return first, expected
