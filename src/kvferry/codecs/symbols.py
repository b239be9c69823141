"""Coefficients in steps, as the symbols of ``transform``, and what those take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.codecs import densities
from kvferry.codecs.activity import Activity
from kvferry.codecs.entropy import Decoder, Encoder
from kvferry.codecs.frequencies import TOTAL

Numbers = npt.NDArray[np.int64]
Symbols = npt.NDArray[np.int32]
DEAD = -14
"""A coefficient whose standard deviation is below ``2 ** (-14 / 8) = 0.3`` steps is not coded."""
_ZERO = 0.6
"""Magnitudes below so many steps become zero. Rounding's 0.5 would cost more bits than its smaller error is worth."""


def quantized(c: npt.NDArray[np.floating[Any]]) -> Symbols:
    """Whole steps."""
    magnitude = np.minimum(np.floor(np.abs(c) + (1 - _ZERO)), 2**30)
    symbols: Symbols = np.copysign(magnitude, c).astype(np.int32)
    return symbols


def write(encoder: Encoder, symbols: Symbols, octaves: Numbers) -> None:
    """``symbols [a, k]``, some coefficients at a time, each token's by the models that suit it."""
    activity, rows = fastest_activity()(symbols.shape[1]), densities.model_of(octaves)
    for some in _batches(symbols):
        order, counts, which = activity.groups(octaves[some])
        encoder.groups(symbols[some].reshape(-1)[order], counts, which, densities.laplace())
        activity.update(rows[some], symbols[some])


def read(decoder: Decoder, tokens: int, octaves: Numbers) -> Symbols:
    """What :func:`write` got."""
    activity, rows = fastest_activity()(tokens), densities.model_of(octaves)
    symbols = np.empty((len(octaves), tokens), np.int32)
    for some in _batches(symbols):
        order, counts, which = activity.groups(octaves[some])
        symbols[some].reshape(-1)[order] = decoder.groups(counts, which, densities.laplace())
        activity.update(rows[some], symbols[some])
    return symbols


def bits_at(octaves: Numbers, step: int) -> float:
    """What a token of calibrated statistics takes; ``octaves`` are of its coefficients, ``step`` as those."""
    alive = octaves - step
    return float(_bits()[densities.model_of(alive[alive >= DEAD])].sum())


def _batches(symbols: Symbols) -> Iterator[slice]:
    """A quarter as many coefficients as came before, at least one: fewer calls, next to nothing lost."""
    start, count = 0, len(symbols) if symbols.size else 0
    while start < count:
        stop = start + max(1, start // 4)
        yield slice(start, stop)
        start = stop


@cache
def _bits() -> npt.NDArray[np.float64]:
    """Entropy of a symbol in bits, for each of the range coder's models."""
    share = densities.laplace().frequencies / TOTAL
    bits: npt.NDArray[np.float64] = -(share * np.log2(share)).sum(1)
    return bits


@cache
def fastest_activity() -> type[Activity]:
    """Compiled, where the package numba is installed."""
    with suppress(ImportError):
        from kvferry.codecs import activity_kernels

        return activity_kernels.Activity
    return Activity
