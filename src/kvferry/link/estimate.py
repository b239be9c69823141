"""How fast a link will be, foretold from the transfers it has carried.

An estimator is fed ``(acknowledged bytes, seconds, backlogged)`` and never a configured rate. A transfer that was not
backlogged (the sender had nothing waiting for part of the time) says how little was sent, not how much could have
been, and is left out. Before the first one nothing is known: ``forecast`` gives None, and a policy must have an answer
to that. One estimator can follow many links at once (``lanes``), which is what the simulator does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.link.trace import Array

LEAST = 1.0
"""Bits per second that an outage counts as, so that ratios stay finite."""


class Estimator(Protocol):
    """A forecast that learns. Unknown is NaN in arrays."""

    def observe(self, nbytes: npt.ArrayLike, seconds: npt.ArrayLike, backlogged: npt.ArrayLike = True) -> None:
        """Learn from one transfer per lane; lanes whose transfer was not backlogged learn nothing."""

    def predict(self) -> Array:
        """Bits per second of the next transfer, ``[lanes]``."""

    def ratios(self) -> Array:
        """Past actual rates over what had been predicted, ``[lanes, window]``, NaN where there is none yet.

        The window is 0 wide where no account is kept.
        """


@dataclass(frozen=True)
class Forecast:
    """What is known of one link.

    Parameters
    ----------
    bits_per_second : float
    ratios : tuple of float or None
        Past actual rates over predicted ones: the forecast's own error, as far as it has been seen. None from an
        estimator that does not keep account of it.
    """

    bits_per_second: float
    ratios: tuple[float, ...] | None = None


def forecast(estimator: Estimator, lane: int = 0) -> Forecast | None:
    """What an estimator knows of one link; None before the first backlogged transfer."""
    rate = float(estimator.predict()[lane])
    seen = estimator.ratios()[lane]
    return None if np.isnan(rate) else Forecast(rate, tuple(seen[~np.isnan(seen)].tolist()) if len(seen) else None)


@dataclass
class Ewma:
    """``B_hat = alpha B + (1 - alpha) B_hat``; the first transfer is taken whole (Cheng and Liao 2026, alpha 0.3)."""

    alpha: float = 0.3
    lanes: int = 1
    _rate: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise InputError(f"alpha is above 0 and at most 1, not {self.alpha}")
        self._rate = np.full(self.lanes, np.nan)

    def observe(self, nbytes: npt.ArrayLike, seconds: npt.ArrayLike, backlogged: npt.ArrayLike = True) -> None:
        actual = _measured(nbytes, seconds, backlogged, self.lanes)
        mixed = np.where(np.isnan(self._rate), actual, self.alpha * actual + (1 - self.alpha) * self._rate)
        self._rate = np.where(np.isnan(actual), self._rate, mixed)

    def predict(self) -> Array:
        return self._rate

    def ratios(self) -> Array:
        return np.empty((self.lanes, 0))


@dataclass
class HarmonicMean:
    """Harmonic mean of the last transfers, divided by 1 plus its largest relative error over them.

    RobustMPC's predictor (Yin, Jindal, Sekar and Sinopoli, SIGCOMM 2015): the mean of the last five, and
    ``max |predicted - actual| / actual`` of the same five.
    """

    last: int = 5
    lanes: int = 1
    _rates: Array = field(init=False, repr=False)
    _errors: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.last < 1:
            raise InputError(f"a mean needs at least one transfer, not {self.last}")
        self._rates = np.full((self.lanes, self.last), np.nan)
        self._errors = np.full((self.lanes, self.last), np.nan)

    def observe(self, nbytes: npt.ArrayLike, seconds: npt.ArrayLike, backlogged: npt.ArrayLike = True) -> None:
        actual = _measured(nbytes, seconds, backlogged, self.lanes)
        error = np.abs(self._mean() - actual) / actual
        self._errors = _pushed(self._errors, np.where(np.isnan(error) & ~np.isnan(actual), 0.0, error))
        self._rates = _pushed(self._rates, actual)

    def predict(self) -> Array:
        discounted: Array = self._mean() / (1 + np.nan_to_num(self._errors).max(axis=1))
        return discounted

    def ratios(self) -> Array:
        return np.empty((self.lanes, 0))

    def _mean(self) -> Array:
        """Without the discount, ``[lanes]``."""
        known = ~np.isnan(self._rates)
        inverse = np.where(known, 1 / self._rates, 0.0).sum(axis=1)
        mean: Array = np.where(known.any(axis=1), known.sum(axis=1) / np.where(inverse > 0, inverse, 1.0), np.nan)
        return mean


@dataclass
class Quantile:
    """A point forecast together with the empirical distribution of its own error, actual over predicted.

    In the spirit of Fugu (Yan et al., NSDI 2020), which foretells a distribution of transfer times: here the
    distribution is that of the last ``window`` ratios, whatever the point forecast is.
    """

    base: Estimator
    window: int = 64
    _ratios: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"the window holds at least one transfer, not {self.window}")
        self._ratios = np.full((len(self.base.predict()), self.window), np.nan)

    def observe(self, nbytes: npt.ArrayLike, seconds: npt.ArrayLike, backlogged: npt.ArrayLike = True) -> None:
        actual = _measured(nbytes, seconds, backlogged, len(self._ratios))
        self._ratios = _pushed(self._ratios, actual / np.maximum(self.base.predict(), LEAST))
        self.base.observe(nbytes, seconds, backlogged)

    def predict(self) -> Array:
        return self.base.predict()

    def ratios(self) -> Array:
        return self._ratios


def below(ratios: Array, bounds: Array) -> Array:
    """Chance that the next ratio is below each bound, ``[lanes, bounds]``; 1 where no error has been seen.

    With ``n`` past ratios of which ``k`` are below, ``(k + 1) / (n + 1)``: for exchangeable errors the true chance is
    on average no larger (conformal prediction; Vovk, Gammerman and Shafer 2005).

    Parameters
    ----------
    ratios : float64 ``[lanes, window]``
        NaN where there is none.
    bounds : float64 ``[lanes, bounds]``
    """
    known = (~np.isnan(ratios)).sum(axis=1, keepdims=True)
    # NaN compares false, so it counts as neither seen nor below.
    count = (ratios[:, None, :] < bounds[:, :, None]).sum(axis=2)
    chance: Array = (count + 1) / (known + 1)
    return chance


def lower_bound(ratios: Array, epsilon: float) -> Array:
    """The ratio that the next one falls below with a chance of at most ``epsilon``, ``[lanes]``: :func:`below` turned
    round. NaN where fewer than ``1 / epsilon - 1`` have been seen."""
    known = (~np.isnan(ratios)).sum(axis=1)
    rank = np.floor(epsilon * (known + 1) + 1e-9).astype(np.int64)
    if not ratios.shape[1]:
        return np.full(len(ratios), np.nan)
    rising = np.sort(ratios, axis=1)  # NaN last
    bound: Array = np.where(rank > 0, rising[np.arange(len(rank)), np.maximum(rank, 1) - 1], np.nan)
    return bound


def _measured(nbytes: npt.ArrayLike, seconds: npt.ArrayLike, backlogged: npt.ArrayLike, lanes: int) -> Array:
    """Bits per second of one transfer per lane, at least :data:`LEAST`; NaN where it says nothing."""
    sent, took = np.asarray(nbytes, np.float64), np.asarray(seconds, np.float64)
    if not (np.isfinite(sent).all() and np.isfinite(took).all() and (sent >= 0).all() and (took >= 0).all()):
        raise InputError("a transfer has a finite number of bytes and seconds, 0 or more")
    useful = np.asarray(backlogged, bool) & (took > 0)
    rate = np.maximum(8 * sent / np.where(took > 0, took, 1.0), LEAST)
    result: Array = np.broadcast_to(np.where(useful, rate, np.nan), (lanes,))
    return result


def _pushed(window: Array, newest: Array) -> Array:
    """The window with the newest value at its end, in the lanes that have one."""
    moved = np.concatenate([window[:, 1:], newest[:, None]], axis=1)
    result: Array = np.where(np.isnan(newest)[:, None], window, moved)
    return result
