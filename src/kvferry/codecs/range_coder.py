"""A range coder in whole numbers: words of 32 bits, an interval of 64, probabilities of 24.

Its stream is, bit for bit, that of ``stream.queue`` in the library constriction (see
:mod:`kvferry.codecs.range_library`). The two loops are written once: Python runs them as they are, and
:mod:`kvferry.codecs.range_kernels` has numba compile them.

After G. N. N. Martin, "Range encoding: an algorithm for removing redundancy from a digitised message" (1979).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.codecs.frequencies import TOTAL, Adaptive, Edges, Models
from kvferry.errors import CorruptError, InputError

Index = npt.NDArray[np.integer[Any]]
Symbols = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]
Loop = Callable[..., int]
_WORD = 1 << 32
_WHOLE = (1 << 64) - 1
_SLACK = (1 << 33) - 1
"""A stream's number lies less than this above the interval when all is read: what a seal leaves open."""
_NONE = np.zeros((0, 1), np.uint32)


def loops(number: Callable[[int], Any]) -> tuple[Loop, Loop]:
    """Encode and decode, over numbers that ``number`` makes: Python's (``int``) or of 64 bits (``numpy.uint64``).

    Symbols come in groups, ``counts`` in each. ``which`` says a group's model: a row of ``edges`` (``[models, alphabet
    + 1]``: the sums of the frequencies before each symbol, and of all), or, negative, minus the number of symbols that
    are equally likely. ``state`` holds the interval: where it begins (for decode: how far the stream's number lies
    above that), and how long it is. ``at`` is the number of words written or read so far; both give the new one, or -1
    where symbols and models do not fit.
    """
    word, precision, one, total = number(32), number(24), number(1), number(TOTAL)
    most, whole = number(_WORD - 1), number(_WHOLE)

    def encode(state: Any, words: Any, at: int, edges: Any, which: Any, counts: Any, columns: Any) -> int:
        """Write ``columns`` to ``words``, which have room for one word a symbol."""
        lower, span = state[0], state[1]
        start = 0
        for group in range(len(which)):
            row = which[group]
            size = -row if row < 0 else edges.shape[1] - 1
            stop = start + counts[group]
            if row >= edges.shape[0] or stop > len(columns):
                return -1
            share = total // number(size)
            for k in range(start, stop):
                column = columns[k]
                if column < 0 or column >= size:
                    return -1
                if row < 0:
                    low = number(column) * share
                    width = share if column + 1 < size else total - low
                else:
                    low = number(edges[row, column])
                    width = number(edges[row, column + 1]) - low
                scale = span >> precision
                span = scale * width
                before = lower
                lower = (lower + scale * low) & whole
                if lower < before:
                    back = at - 1
                    while words[back] == most:
                        words[back] = 0
                        back -= 1
                    words[back] += one
                if span <= most:
                    words[at] = lower >> word
                    at += 1
                    lower = (lower << word) & whole
                    span = span << word
            start = stop
        state[0], state[1] = lower, span
        return at

    def decode(state: Any, words: Any, at: int, edges: Any, which: Any, counts: Any, columns: Any) -> int:
        """Read ``columns``; beyond their end, ``words`` are zeros."""
        above, span = state[0], state[1]
        start = 0
        for group in range(len(which)):
            row = which[group]
            size = -row if row < 0 else edges.shape[1] - 1
            stop = start + counts[group]
            if row >= edges.shape[0] or stop > len(columns):
                return -1
            share, last = total // number(size), number(size - 1)
            for k in range(start, stop):
                scale = span >> precision
                if above >= scale << precision:
                    return -1
                if row < 0:
                    equal = above // (scale * share)
                    equal = equal if equal < last else last
                    low = equal * share
                    width = share if equal < last else total - low
                    columns[k] = equal
                else:
                    column, step = size >> 1, 1
                    beyond = column + 1
                    while scale * number(edges[row, column]) > above:
                        beyond, column, step = column, max(column - step, 0), 2 * step
                    while scale * number(edges[row, beyond]) <= above:
                        column, beyond, step = beyond, min(beyond + step, size), 2 * step
                    while beyond - column > 1:
                        middle = (column + beyond) >> 1
                        if scale * number(edges[row, middle]) <= above:
                            column = middle
                        else:
                            beyond = middle
                    low = number(edges[row, column])
                    width = number(edges[row, beyond]) - low
                    columns[k] = column
                above = above - scale * low
                span = scale * width
                if span <= most:
                    above, span = above << word, span << word
                    if at < len(words):
                        above = above | number(words[at])
                        at += 1
            start = stop
        state[0], state[1] = above, span
        return at

    return encode, decode


def _plain(loop: Loop) -> Loop:
    """Over memory of arrays, which Python reads and writes as its own numbers."""

    def run(state: Any, words: Any, at: int, *rest: Any) -> int:
        return loop(memoryview(state), memoryview(words), at, *(memoryview(x) for x in rest))

    return run


ENCODE, DECODE = (_plain(loop) for loop in loops(int))


class Writer:
    """Writes one stream. Symbols are columns of their model, from 0 on."""

    def __init__(self, encode: Loop = ENCODE) -> None:
        self._encode = encode
        self._state = np.array([0, _WHOLE], np.uint64)
        self._words = np.empty(1 << 10, np.uint32)
        self._at = 0

    def groups(self, columns: Index, counts: Index, which: Index, models: Models) -> None:
        """``columns`` group after group, each by its row of ``models``."""
        self._write(models.edges, which, counts, columns)

    def apart(self, columns: Index, models: Adaptive) -> None:
        """Each by its row of ``models``."""
        self._write(models.edges(), np.arange(len(columns)), np.ones(len(columns), np.int64), columns)

    def uniform(self, columns: Index, sizes: Index) -> None:
        """Each as likely as any other below its size."""
        self._write(_NONE, -sizes.astype(np.int64), np.ones(len(columns), np.int64), columns)

    def finish(self) -> bytes:
        """The shortest stream of whole words that nothing behind it can spoil; none where nothing was written."""
        lower, span = map(int, self._state)
        if span == _WHOLE:
            return b""
        words, point = self._words[: self._at].copy(), lower + _WORD - 1
        if point > _WHOLE:
            back = np.flatnonzero(words != _WORD - 1)[-1]
            words[back] += 1
            words[back + 1 :] = 0
        first, end = (x % (_WHOLE + 1) // _WORD for x in (point, lower + span))
        tail = np.array([first] if first != end else [first, 0], np.uint32)
        return np.concatenate([words, tail]).astype("<u4").tobytes()

    def _write(self, edges: Edges, which: Index, counts: Index, columns: Index) -> None:
        room = self._at + len(columns)
        if room > len(self._words):
            words = np.empty(2 * room, np.uint32)
            words[: self._at] = self._words[: self._at]
            self._words = words
        numbers = (np.ascontiguousarray(x, kind) for x, kind in zip((which, counts, columns), _KINDS, strict=True))
        at = self._encode(self._state, self._words, self._at, edges, *numbers)
        if at < 0:
            raise InputError("symbols that their models do not have cannot be range-coded")
        self._at = at


class Reader:
    """Reads what a :class:`Writer` wrote, or raises :class:`~kvferry.errors.CorruptError`."""

    def __init__(self, words: Words, decode: Loop = DECODE) -> None:
        self._decode = decode
        first, second = (*words[:2].tolist(), 0, 0)[:2]
        self._state = np.array([first * _WORD + second, _WHOLE], np.uint64)
        self._words = words
        self._at = min(2, len(words))

    def groups(self, counts: Index, which: Index, models: Models) -> Symbols:
        """What :meth:`Writer.groups` got."""
        return self._read(models.edges, which, counts, int(counts.sum()))

    def apart(self, models: Adaptive) -> Symbols:
        """What :meth:`Writer.apart` got."""
        edges = models.edges()
        count = len(edges)
        return self._read(edges, np.arange(count), np.ones(count, np.int64), count)

    def uniform(self, sizes: Index) -> Symbols:
        """What :meth:`Writer.uniform` got."""
        return self._read(_NONE, -sizes.astype(np.int64), np.ones(len(sizes), np.int64), len(sizes))

    def exhausted(self) -> bool:
        """Whether all words are read and say nothing more."""
        above, span = map(int, self._state)
        return self._at == len(self._words) and (span == _WHOLE or above < _SLACK)

    def _read(self, edges: Edges, which: Index, counts: Index, count: int) -> Symbols:
        columns = np.empty(count, np.int32)
        numbers = (np.ascontiguousarray(x, kind) for x, kind in zip((which, counts), _KINDS, strict=False))
        at = self._decode(self._state, self._words, self._at, edges, *numbers, columns)
        if at < 0:
            raise CorruptError("range-coded bytes that no symbols give")
        self._at = at
        return columns


_KINDS = np.int64, np.int64, np.int32
