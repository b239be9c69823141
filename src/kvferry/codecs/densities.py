"""Laplace and Gaussian models as tables of integers, the same on every machine.

Made once per process by integer arithmetic and :mod:`decimal`, whose ``exp`` and ``sqrt`` are correctly rounded
everywhere; a floating-point ``exp`` differs from one processor and library to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Context, Decimal
from functools import cache

import numpy as np
import numpy.typing as npt

from kvferry.codecs.frequencies import TOTAL, Models

REACH = 255
"""Symbols from -254 to 254 have a frequency of their own."""
SCALES = 88
"""How many standard deviations each family has: an eighth of an octave apart, from ``2**-4`` to ``2**6.875`` steps."""
LOWEST = -32
_UNIT = 1 << 96
_EXACT = Context(prec=60)


@cache
def laplace() -> Models:
    """A Laplace density integrated over unit bins, for each of the :data:`SCALES` standard deviations."""
    return _family(_laplace_masses)


@cache
def gaussian() -> Models:
    """A Gaussian density integrated over unit bins, for each of the :data:`SCALES` standard deviations."""
    return _family(_gaussian_masses)


def nearest(deviation: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Which row of a family is nearest to each standard deviation (in steps).

    The logarithm may differ between machines in its last bit: let the index travel, not the deviation.
    """
    return model_of(np.rint(8 * np.log2(np.maximum(deviation, 2.0**-64))).astype(np.int64))


def model_of(octaves: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Which row of a family has the standard deviation ``2 ** (octaves / 8)`` steps, or is nearest to it."""
    rows: npt.NDArray[np.uint8] = np.minimum(np.maximum(octaves - LOWEST, 0), SCALES - 1).astype(np.uint8)
    return rows


def _family(masses: Callable[[Decimal], Iterator[int]]) -> Models:
    """``masses`` gives the weights of 0, 1, 2, ... for a standard deviation; both signs weigh the same."""
    eighth = _EXACT.sqrt(_EXACT.sqrt(_EXACT.sqrt(Decimal(2))))
    deviation = Decimal(1) / 16
    rows = []
    for _ in range(SCALES):
        half = [0] * (REACH + 1)
        for magnitude, mass in enumerate(masses(deviation)):
            half[min(magnitude, REACH)] += mass
        whole = half[:0:-1] + half
        row = [1 + mass * (TOTAL - len(whole)) // sum(whole) for mass in whole]
        row[REACH] += TOTAL - sum(row)
        rows.append(row)
        deviation = _EXACT.multiply(deviation, eighth)
    return Models(np.array(rows, np.int64))


def _laplace_masses(deviation: Decimal) -> Iterator[int]:
    """``1 - f``, then ``(1 - f^2) f^(2k - 1) / 2``, with ``f = exp(-1 / 2b)`` and ``b = deviation / sqrt(2)``."""
    f = _fixed(_EXACT.divide(Decimal(-1), _EXACT.multiply(deviation, _EXACT.sqrt(Decimal(2)))))
    yield _UNIT - f
    square = f * f // _UNIT
    mass = (_UNIT - square) * f // (2 * _UNIT)
    while mass:
        yield mass
        mass = mass * square // _UNIT


def _gaussian_masses(deviation: Decimal) -> Iterator[int]:
    """Simpson's rule on 16 intervals a bin; ``exp(-(j + 1)^2 c) = exp(-j^2 c) exp(-(2j + 1) c)`` gives the density."""
    q = _fixed(_EXACT.divide(Decimal(-1), _EXACT.multiply(512, _EXACT.multiply(deviation, deviation))))
    square = q * q // _UNIT
    density = [_UNIT]
    while density[-1]:
        density.append(density[-1] * q // _UNIT)
        q = q * square // _UNIT
    density += [0] * 16
    weights = [1, *(4, 2) * 7, 4, 1]
    yield sum(w * density[abs(j)] for w, j in zip(weights, range(-8, 9), strict=True))
    for start in range(8, len(density) - 16, 16):
        yield sum(w * d for w, d in zip(weights, density[start : start + 17], strict=True))


def _fixed(exponent: Decimal) -> int:
    """``exp(exponent)`` in units of ``2**-96``."""
    return int(_EXACT.multiply(_EXACT.exp(exponent), Decimal(_UNIT)))
