"""The range coder of the library constriction, by the names that :mod:`kvferry.codecs.range_coder` gives to its own.

See R. Bamler, "Understanding Entropy Coding With Asymmetric Numeral Systems (ANS): a Statistician's Perspective", arXiv
2201.01741. constriction's ``Categorical(perfect=False)`` computes ``floor(sum of floats * scale) + rank``; given the
frequencies less one as float64, which sum to ``2**24 - alphabet``, the scale is exactly 1 and no float operation ever
rounds: the cumulative frequencies are those of the row, whatever the processor. Its models that evaluate ``exp`` or
``erf`` while they code (``QuantizedLaplace``, ``QuantizedGaussian``) are not used for that reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import constriction
import numpy as np

from kvferry.codecs.frequencies import Adaptive, Models
from kvferry.codecs.range_coder import Index, Symbols, Words
from kvferry.errors import CorruptError

_FAMILY, _UNIFORM = constriction.stream.model.Categorical(perfect=False), constriction.stream.model.Uniform()


class Writer:
    """See :class:`kvferry.codecs.range_coder.Writer`."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def groups(self, columns: Index, counts: Index, which: Index, models: Models) -> None:
        numbers = columns.astype(np.int32)
        parts = (numbers[start:stop] for start, stop in pairwise([0, *np.cumsum(counts).tolist()]))
        for model, part in zip(_rows(models, which), parts, strict=True):
            self._coder.encode(part, model)

    def apart(self, columns: Index, models: Adaptive) -> None:
        self._coder.encode(columns.astype(np.int32), _FAMILY, models.probabilities())

    def uniform(self, columns: Index, sizes: Index) -> None:
        self._coder.encode(columns.astype(np.int32), _UNIFORM, sizes.astype(np.int32))

    def finish(self) -> bytes:
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())


class Reader:
    """See :class:`kvferry.codecs.range_coder.Reader`."""

    def __init__(self, words: Words) -> None:
        self._coder = constriction.stream.queue.RangeDecoder(words)

    def groups(self, counts: Index, which: Index, models: Models) -> Symbols:
        parts = [self._read(m, n) for m, n in zip(_rows(models, which), counts.tolist(), strict=True) if n]
        return np.concatenate(parts)

    def apart(self, models: Adaptive) -> Symbols:
        return self._read(_FAMILY, models.probabilities())

    def uniform(self, sizes: Index) -> Symbols:
        return self._read(_UNIFORM, sizes.astype(np.int32))

    def exhausted(self) -> bool:
        return bool(self._coder.maybe_exhausted())

    def _read(self, *model: Any) -> Symbols:
        try:
            symbols: Symbols = self._coder.decode(*model)
        except AssertionError:
            raise CorruptError("range-coded bytes that no symbols give") from None
        return symbols


def _rows(models: Models, which: Index) -> Iterator[Any]:
    """constriction's model of each group."""
    return (_row(models, row) for row in which.tolist())


@lru_cache(maxsize=1024)
def _row(models: Models, row: int) -> Any:
    return constriction.stream.model.Categorical((models.frequencies[row] - 1).astype(np.float64), perfect=False)
