"""Integers <-> bytes by a range coder whose probabilities are integers, the same on every machine.

The coder is the range coder of the library constriction (R. Bamler, "Understanding Entropy Coding With Asymmetric
Numeral Systems (ANS): a Statistician's Perspective", arXiv 2201.01741). A model is a row of frequencies that sum to
``2**24``. constriction's ``Categorical(perfect=False)`` computes ``floor(sum of floats * scale) + rank``; given the
frequencies less one as float64, which sum to ``2**24 - alphabet``, the scale is exactly 1 and no float operation ever
rounds: the cumulative frequencies are those of the row, whatever the processor. Its models that evaluate ``exp`` or
``erf`` while they code (``QuantizedLaplace``, ``QuantizedGaussian``) are not used for that reason. The two families
here, :func:`laplace` and :func:`gaussian`, are tables made by integers and :mod:`decimal`, whose ``exp`` and ``sqrt``
are correctly rounded everywhere.

One thread of an AMD EPYC encodes 13 (512 groups of 200 symbols) to 75 million symbols a second (64 groups of 4,000),
and decodes 10 to 15 million.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.errors import CorruptError, DependencyError, InputError

Symbols = npt.NDArray[np.int32]
Index = npt.NDArray[np.integer[Any]]

TOTAL = 1 << 24
REACH = 255
"""Of :func:`laplace` and :func:`gaussian`: symbols from -254 to 254 have a frequency of their own."""
SCALES = 88
"""How many standard deviations the two families have: an eighth of an octave apart, from ``2**-4`` to ``2**6.875``."""
_LOWEST = -32
_UNIT = 1 << 96
_EXACT = Context(prec=60)
_CLASSES = 33
"""Bit lengths of an excess: 1 to 32, and one more, for a row of frequencies has an odd length."""


@dataclass(frozen=True, eq=False)
class Models:
    """Models of symbols around zero.

    Parameters
    ----------
    frequencies : int64 ``[models, 2 * reach + 1]``
        Positive; every row sums to ``2**24``. Column ``s + reach`` belongs to the symbol ``s``, the first and the last
        to all symbols of magnitude ``reach`` and more, whose excess follows in an Elias gamma code.
    """

    frequencies: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        rows = self.frequencies
        if rows.ndim != 2 or rows.shape[1] < 3 or not rows.shape[1] % 2:
            raise InputError(f"frequencies must be [models, 2 * reach + 1], not {list(rows.shape)}")
        if (rows < 1).any() or (rows.sum(1) != TOTAL).any():
            raise InputError("every row of frequencies must be positive and sum to 2**24; make it by from_counts")

    @property
    def reach(self) -> int:
        """The magnitude from which on symbols share a frequency."""
        return int(self.frequencies.shape[1]) // 2

    @classmethod
    def from_counts(cls, counts: npt.NDArray[np.int64]) -> Models:
        """Frequencies in proportion to ``counts`` (``[models, 2 * reach + 1]``, from 0 to ``2**38``), by integers only.

        What has no count still gets ``2**-24``; a row of zeros becomes uniform.
        """
        if (counts < 0).any() or (counts > 1 << 38).any():
            raise InputError("counts lie between 0 and 2**38")
        counts = counts + (counts.sum(1, keepdims=True) == 0)
        rows = 1 + counts * (TOTAL - counts.shape[1]) // counts.sum(1, keepdims=True)
        rows[np.arange(len(rows)), counts.argmax(1)] += TOTAL - rows.sum(1)
        return cls(rows)


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
    rows: npt.NDArray[np.uint8] = np.clip(octaves - _LOWEST, 0, SCALES - 1).astype(np.uint8)
    return rows


def fit(symbols: Symbols, counts: Index, models: Models) -> npt.NDArray[np.uint8]:
    """The model that codes each group in the fewest bits, ``[groups]``; at most 256 models.

    ``symbols`` and ``counts`` as in :func:`encode`.
    """
    bits = -np.log2(models.frequencies / TOTAL)
    rows: npt.NDArray[np.uint8] = (histograms(symbols, counts, models.reach) @ bits.T).argmin(1).astype(np.uint8)
    return rows


def histograms(symbols: Symbols, counts: Index, reach: int) -> npt.NDArray[np.int64]:
    """How often each group holds each symbol, ``[groups, 2 * reach + 1]``; the ends count what is beyond, too."""
    width = 2 * reach + 1
    group = np.repeat(np.arange(len(counts)), counts)
    flat = np.bincount(group * width + np.clip(symbols, -reach, reach) + reach, minlength=len(counts) * width)
    return flat.reshape(-1, width)


def shannon_bits(symbols: Symbols, counts: Index, reach: int = REACH) -> float:
    """Shannon entropy of the symbols in bits, all groups together, each by its own frequencies."""
    seen = histograms(symbols, counts, reach).astype(np.float64)
    share = np.divide(seen, seen.sum(1, keepdims=True), out=np.ones_like(seen), where=seen > 0)
    return float(-(seen * np.log2(share)).sum())


def encode(symbols: Symbols, counts: Index, which: Index, models: Models) -> bytes:
    """Any int32 symbols as range-coded bytes, a multiple of 4.

    Parameters
    ----------
    symbols : int32 ``[n]``
        Group after group.
    counts : int ``[groups]``
        How many symbols each group has; they sum to ``n``.
    which : int ``[groups]``
        The row of ``models`` for each group. The decoder needs the same.
    """
    if not len(symbols):
        return b""
    library, reach = _library(), models.reach
    encoder = library.stream.queue.RangeEncoder()
    clipped = np.clip(symbols, -reach, reach).astype(np.int32)
    for model, part in zip(_coders(models, which), np.split(clipped + reach, np.cumsum(counts)[:-1]), strict=True):
        encoder.encode(part, model)
    excess = np.abs(symbols.astype(np.int64))[np.abs(clipped) == reach] - reach + 1
    if len(excess):
        lengths = np.frexp(excess.astype(np.float64))[1].astype(np.int32)
        encoder.encode(lengths - 1, _gamma())
        for start in (0, 16):
            bits = np.clip(lengths - 1 - start, 0, 16)
            low = (excess >> start) & ((1 << bits) - 1)
            encoder.encode(low[bits > 0].astype(np.int32), library.stream.model.Uniform(), 1 << bits[bits > 0])
    return bytes(encoder.get_compressed().astype("<u4").tobytes())


def decode(payload: bytes, counts: Index, which: Index, models: Models) -> Symbols:
    """What :func:`encode` got. :class:`~kvferry.errors.CorruptError` where ``payload`` cannot be right.

    Takes memory in proportion to the sum of ``counts``, whatever the payload holds.
    """
    if len(payload) % 4 or bool(payload) != bool(np.sum(counts)):
        raise CorruptError(f"{len(payload)} range-coded bytes, where {int(np.sum(counts))} symbols were expected")
    if not payload:
        return np.empty(0, np.int32)
    library, reach = _library(), models.reach
    decoder = library.stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))
    try:
        parts = [decoder.decode(m, int(n)) for m, n in zip(_coders(models, which), counts, strict=True) if n]
        symbols = np.concatenate(parts).astype(np.int64) - reach
        ends = np.flatnonzero(np.abs(symbols) == reach)
        if len(ends):
            lengths = decoder.decode(_gamma(), len(ends))
            excess = np.left_shift(np.int64(1), lengths.astype(np.int64))
            for start in (0, 16):
                bits = np.clip(lengths - start, 0, 16)
                low = decoder.decode(library.stream.model.Uniform(), 1 << bits[bits > 0])
                excess[bits > 0] |= low.astype(np.int64) << start
            symbols[ends] += np.sign(symbols[ends]) * (excess - 1)
    except AssertionError:
        raise CorruptError("range-coded bytes that no symbols give") from None
    if not decoder.maybe_exhausted() or np.abs(symbols + 0.5).max() > 2**31:
        raise CorruptError("range-coded bytes that hold more than their symbols")
    return symbols.astype(np.int32)


def _coders(models: Models, which: Index) -> Iterator[Any]:
    """constriction's model of each group; each distinct one is made once."""
    categorical = _library().stream.model.Categorical
    made = {}
    for row in which.tolist():
        if row not in made:
            made[row] = categorical((models.frequencies[row] - 1).astype(np.float64), perfect=False)
        yield made[row]


def _gamma() -> Any:
    """The model of an excess' bit length: each bit more is half as likely."""
    counts = np.array([[1 << max(_CLASSES - 1 - i, 0) for i in range(_CLASSES)]])
    return next(_coders(Models.from_counts(counts), np.zeros(1, np.int64)))


def _family(masses: Any) -> Models:
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


def _library() -> Any:
    """constriction, where it is installed: there is no wheel for every platform."""
    try:
        import constriction
    except ImportError:
        raise DependencyError(
            "entropy-coded recipes need the package constriction, which has no wheel for Linux on arm64; build it "
            "there from its source (github.com/bamler-lab/constriction, needs Rust), or choose another codec"
        ) from None
    return constriction
