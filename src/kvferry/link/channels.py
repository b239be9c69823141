"""Synthetic links: Markov chains of rates, drawn with a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.errors import InputError
from kvferry.link.trace import RateTrace


@dataclass(frozen=True)
class Markov:
    """A rate that jumps between states once a step (as in Mao, Netravali and Alizadeh, SIGCOMM 2017, section 4.1).

    Parameters
    ----------
    mbit : tuple of float
        Mbit/s of each state, 0 allowed.
    moves : tuple of tuple of float
        ``moves[i][j]``: chance of going from state ``i`` to ``j`` in a step; rows add up to 1.
    step : float
        Seconds.
    """

    mbit: tuple[float, ...]
    moves: tuple[tuple[float, ...], ...]
    step: float = 0.1

    def __post_init__(self) -> None:
        matrix = np.asarray(self.moves, np.float64) if len({len(row) for row in self.moves}) == 1 else np.empty((0, 0))
        square = matrix.shape == (len(self.mbit), len(self.mbit)) and matrix.size > 0
        if not (square and (matrix >= 0).all() and np.allclose(matrix.sum(1), 1)):
            raise InputError("a chain needs one row of chances per rate, each row 0 or more and adding up to 1")

    def trace(self, seconds: float, seed: int) -> RateTrace:
        """A path that starts in a state drawn from the long run's shares; the same seed gives the same path.

        Raises
        ------
        InputError
            The path is shorter than a step, or its link never rises above zero.
        """
        count = round(seconds / self.step)
        if count < 1:
            raise InputError(f"{seconds} s are less than one step of {self.step} s; ask for more")
        draws = np.random.default_rng(seed).random(count)
        ladder = np.cumsum(self.moves, axis=1)
        states = np.empty(count, np.int64)
        row = np.cumsum(self.long_run())
        for k, draw in enumerate(draws):
            states[k] = min(int(np.searchsorted(row, draw, side="right")), len(self.mbit) - 1)
            row = ladder[states[k]]
        return RateTrace(1e6 * np.asarray(self.mbit, np.float64)[states], self.step)

    def long_run(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Share of time in each state."""
        size = len(self.mbit)
        equations = np.vstack([np.asarray(self.moves).T - np.eye(size), np.ones(size)])
        shares = np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)[0]
        result: np.ndarray[tuple[int], np.dtype[np.float64]] = np.clip(shares, 0, None) / np.clip(shares, 0, None).sum()
        return result


@dataclass(frozen=True)
class GilbertElliott:
    """Two states, good and bad, each held for an exponential (geometric) time (Gilbert 1960, Elliott 1963).

    Parameters
    ----------
    good, bad : float
        Mbit/s; ``bad=0`` is an outage.
    good_seconds, bad_seconds : float
        Mean time in each, at least a step.
    step : float
        Seconds.
    """

    good: float
    bad: float = 0.0
    good_seconds: float = 5.0
    bad_seconds: float = 1.0
    step: float = 0.1

    def __post_init__(self) -> None:
        if not (self.step > 0 and min(self.good_seconds, self.bad_seconds) >= self.step):
            raise InputError(f"a state lasts at least a step of {self.step} s; make its mean time longer")

    @property
    def chain(self) -> Markov:
        """The same as a chain of two states."""
        leave, come = self.step / self.good_seconds, self.step / self.bad_seconds
        return Markov((self.good, self.bad), ((1 - leave, leave), (come, 1 - come)), self.step)

    def trace(self, seconds: float, seed: int) -> RateTrace:
        """A path; see :meth:`Markov.trace`."""
        return self.chain.trace(seconds, seed)


def walk(low: float, high: float, states: int = 7, stay: float = 0.8, step: float = 0.5) -> Markov:
    """A chain over ``states`` rates evenly spaced in ratio from ``low`` to ``high`` Mbit/s, moving to neighbours only.

    Raises
    ------
    InputError
        ``low`` is not positive and below ``high``, there are under two states, or ``stay`` is no chance.
    """
    if not (0 < low < high and states >= 2 and 0 <= stay < 1):
        raise InputError("a walk needs 0 < low < high, two or more states, and a chance to stay below 1")
    moves = np.zeros((states, states))
    for i in range(states):
        near = [j for j in (i - 1, i + 1) if 0 <= j < states]
        moves[i, near] = (1 - stay) / len(near)
        moves[i, i] = stay
    return Markov(tuple(np.geomspace(low, high, states).tolist()), tuple(map(tuple, moves.tolist())), step)


SHIPPED: dict[str, tuple[Markov | GilbertElliott, float, int]] = {
    "steady": (Markov((6.0,), ((1.0,),)), 2.0, 0),
    "walk": (walk(1.0, 16.0), 20.0, 1),
    "outages": (GilbertElliott(6.0, 0.0, good_seconds=4.0, bad_seconds=1.0), 30.0, 6),
    "narrow": (walk(0.2, 2.0), 60.0, 3),
}
"""The traces in the package: channel, seconds, seed. ``kvferry trace --shipped`` writes them."""
