"""Integers <-> bytes by a range coder whose probabilities are integers, the same on every machine.

A model is a row of frequencies that sum to ``2**24``. Three coders write and read the same bits: this package's own
loops compiled by numba (:mod:`kvferry.codecs.range_kernels`), else the library constriction
(:mod:`kvferry.codecs.range_library`), else the loops as Python runs them (:mod:`kvferry.codecs.range_coder`).

The first codes 1.3 to 3 times as many symbols a second as the second, and that 5 to 50 times as many as the third
(``python benchmarks/range_coder.py``). Loading numba takes 0.4 s once in a process, 2 s where nothing is compiled yet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvferry.codecs import range_coder
from kvferry.codecs.densities import REACH, SCALES, gaussian, laplace, nearest
from kvferry.codecs.frequencies import TOTAL, Adaptive, Models
from kvferry.codecs.range_coder import Index, Symbols, Words
from kvferry.errors import CorruptError
from kvferry.patience import step

if TYPE_CHECKING:
    from kvferry.codecs import range_library

    Writer: TypeAlias = range_coder.Writer | range_library.Writer
    Reader: TypeAlias = range_coder.Reader | range_library.Reader

_FIRST = np.zeros(1, np.int64)
_CLASSES = 33
"""Bit lengths of an excess: 1 to 32, and one more, for a row of frequencies has an odd length."""


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


class Encoder:
    """Writes one stream of symbols; a :class:`Decoder` is asked for the same in the same order."""

    def __init__(self) -> None:
        self._coder = coders().writer()

    def groups(self, symbols: Symbols, counts: Index, which: Index, models: Models) -> None:
        """Any int32 ``symbols``: see :func:`encode`."""
        if not len(symbols):
            return
        reach = models.reach
        columns = np.minimum(np.maximum(symbols, -reach), reach).astype(np.int32) + reach
        self._coder.groups(columns, counts, which, models)
        ends = (columns == 0) | (columns == 2 * reach)
        if ends.any():
            self.excess(np.abs(symbols[ends].astype(np.int64)) - reach)

    def excess(self, values: Index) -> None:
        """``values`` from 0 to ``2**32 - 2``, small ones in few bits: Elias gamma codes."""
        if not len(values):
            return
        above = values.astype(np.int64) + 1
        lengths = np.frexp(above.astype(np.float64))[1].astype(np.int32)
        self._coder.groups(lengths - 1, np.array([len(values)]), _FIRST, _gamma())
        for start in (0, 16):
            bits = np.clip(lengths - 1 - start, 0, 16)
            low = (above >> start) & ((1 << bits) - 1)
            self._uniform(low[bits > 0], 1 << bits[bits > 0])

    def words(self, words: Index) -> None:
        """16-bit ``words [rows, n]``, much alike in a row, as bfloat16 scales are: distances from its median."""
        rows, n = words.shape
        middle = np.median(words, 1).astype(np.int32) if n else np.zeros(rows, np.int32)
        distance, counts = (words.astype(np.int32) - middle[:, None]).reshape(-1), np.full(rows, n)
        which = fit(distance, counts, laplace())
        self.numbers(middle, 1 << 16)
        self.numbers(which, SCALES)
        self.groups(distance, counts, which, laplace())

    def numbers(self, values: Index, size: int) -> None:
        """``values``, each from 0 to ``size - 1`` and as likely as any other; ``size`` is 2 to ``2**16``."""
        self._uniform(values, np.full(len(values), size))

    def adaptive(self, symbols: Index, alphabet: int) -> None:
        """``symbols [rows, n]``, each from 0 to ``alphabet - 1``, column by column, by :class:`Adaptive`."""
        model = coders().adaptive(len(symbols), alphabet)
        for column in symbols.T.astype(np.int32):
            self._coder.apart(column, model)
            model.update(column)

    def finish(self) -> bytes:
        """The stream, a multiple of 4 bytes; none where nothing was written."""
        return self._coder.finish()

    def _uniform(self, values: Index, sizes: Index) -> None:
        if len(values):
            self._coder.uniform(values, sizes)


class Decoder:
    """Reads what an :class:`Encoder` wrote.

    Every method takes memory in proportion to what it is asked for, whatever the payload holds. It gives
    symbols, right or wrong, or raises :class:`~kvferry.errors.CorruptError`.
    """

    def __init__(self, payload: bytes) -> None:
        if len(payload) % 4:
            raise CorruptError(f"{len(payload)} range-coded bytes are no whole words of 4")
        self._words = len(payload) // 4
        self._used = False
        self._coder = coders().reader(np.frombuffer(payload, "<u4").astype(np.uint32))

    def groups(self, counts: Index, which: Index, models: Models) -> Symbols:
        """What :meth:`Encoder.groups` got."""
        if not np.sum(counts):
            return np.empty(0, np.int32)
        reach = models.reach
        symbols: Symbols = self._reader().groups(counts, which, models) - np.int32(reach)
        ends = np.flatnonzero(np.abs(symbols) == reach)
        if len(ends):
            signs = np.sign(symbols[ends]).astype(np.int64)
            beyond = signs * (reach + self.excess(len(ends)))
            if np.abs(beyond + 0.5).max() > 2**31:
                raise CorruptError("range-coded symbols that no 32 bits hold")
            symbols[ends] = beyond
        return symbols

    def excess(self, count: int) -> npt.NDArray[np.int64]:
        """What :meth:`Encoder.excess` got, ``[count]``."""
        if not count:
            return np.empty(0, np.int64)
        lengths = self._reader().groups(np.array([count]), _FIRST, _gamma())
        above = np.left_shift(np.int64(1), lengths.astype(np.int64))
        for start in (0, 16):
            bits = np.clip(lengths - start, 0, 16)
            above[bits > 0] |= self._uniform(1 << bits[bits > 0]).astype(np.int64) << start
        return above - 1

    def words(self, rows: int, n: int) -> npt.NDArray[np.uint16]:
        """What :meth:`Encoder.words` got, ``[rows, n]``."""
        middle, which = self.numbers(rows, 1 << 16), self.numbers(rows, SCALES)
        distance = self.groups(np.full(rows, n), which, laplace()).reshape(rows, n)
        words: npt.NDArray[np.uint16] = (distance + middle[:, None]).astype(np.uint16)
        return words

    def numbers(self, count: int, size: int) -> Symbols:
        """What :meth:`Encoder.numbers` got, ``[count]``."""
        return self._uniform(np.full(count, size))

    def adaptive(self, rows: int, n: int, alphabet: int) -> Symbols:
        """What :meth:`Encoder.adaptive` got, ``[rows, n]``."""
        model = coders().adaptive(rows, alphabet)
        symbols = np.empty((n, rows), np.int32)
        for column in symbols:
            column[:] = self._reader().apart(model)
            model.update(column)
        return symbols.T

    def finish(self) -> None:
        """Refuse a stream that goes on, or that was empty although something was read."""
        if not self._coder.exhausted() or (self._words and not self._used):
            raise CorruptError("range-coded bytes that hold more than their symbols")

    def _uniform(self, sizes: Index) -> Symbols:
        return self._reader().uniform(sizes) if len(sizes) else np.empty(0, np.int32)

    def _reader(self) -> Reader:
        """What gives the next symbols."""
        if not self._words:
            raise CorruptError("no range-coded bytes, where symbols were expected")
        self._used = True
        step()
        return self._coder


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
    encoder = Encoder()
    encoder.groups(symbols, counts, which, models)
    return encoder.finish()


def decode(payload: bytes, counts: Index, which: Index, models: Models) -> Symbols:
    """What :func:`encode` got. :class:`~kvferry.errors.CorruptError` where ``payload`` cannot be right."""
    decoder = Decoder(payload)
    symbols = decoder.groups(counts, which, models)
    decoder.finish()
    return symbols


@cache
def _gamma() -> Models:
    """The model of an excess' bit length: each bit more is half as likely."""
    return Models.from_counts(np.array([[1 << max(_CLASSES - 1 - i, 0) for i in range(_CLASSES)]]))


class Coders(NamedTuple):
    """What writes, what reads, and models that learn, for a number of rows and an alphabet."""

    writer: Callable[[], Writer] = range_coder.Writer
    reader: Callable[[Words], Reader] = range_coder.Reader
    adaptive: Callable[[int, int], Adaptive] = Adaptive


@cache
def coders() -> Coders:
    """The fastest that are installed."""
    with suppress(ImportError):
        from kvferry.codecs import range_kernels

        return Coders(range_kernels.writer, range_kernels.reader, range_kernels.Adaptive)
    with suppress(ImportError):
        from kvferry.codecs import range_library

        return Coders(range_library.Writer, range_library.Reader)
    return Coders()


__all__ = [
    "REACH",
    "SCALES",
    "TOTAL",
    "Adaptive",
    "Decoder",
    "Encoder",
    "Models",
    "Symbols",
    "decode",
    "encode",
    "fit",
    "gaussian",
    "histograms",
    "laplace",
    "nearest",
    "shannon_bits",
]
