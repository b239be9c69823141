"""What :mod:`kvferry.codecs.entropy` does symbol by symbol, compiled by numba: the same bytes.

Only that module imports this one, where the package numba is installed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import int32, int64, uint32, uint64, void

from kvferry.codecs import frequencies, range_coder
from kvferry.codecs.frequencies import MEMORY, ONE, PRIOR, TOTAL, Edges
from kvferry.codecs.jit import kernel, read, written
from kvferry.codecs.range_coder import Index, loops

_encode, _decode = loops(np.uint64)
_MODEL = read(uint32, 2), read(int64, 1), read(int64, 1)
encode = kernel(int64(written(uint64, 1), written(uint32, 1), int64, *_MODEL, read(int32, 1)))(_encode)
decode = kernel(int64(written(uint64, 1), read(uint32, 1), int64, *_MODEL, written(int32, 1)))(_decode)
writer = partial(range_coder.Writer, encode)
reader = partial(range_coder.Reader, decode=decode)


class Adaptive(frequencies.Adaptive):
    """See there."""

    def edges(self) -> Edges:
        edges = np.empty((len(self._own), len(self._shared) + 1), np.uint32)
        _edges(self._own, self._shared, edges)
        return edges

    def update(self, column: Index) -> None:
        _update(self._own, self._shared, np.ascontiguousarray(column, np.int32))


@kernel(void(read(int64, 2), read(int64, 1), written(uint32, 2)))
def _edges(own: Any, shared: Any, edges: Any) -> None:
    """:meth:`frequencies.Adaptive.edges`; the first symbol has what the others leave."""
    rows, alphabet = own.shape
    prior = shared * (PRIOR * ONE) // shared.sum()
    for row in range(rows):
        whole = 0
        for symbol in range(alphabet):
            whole += own[row, symbol] + prior[symbol]
        edge = TOTAL
        edges[row, alphabet] = edge
        for symbol in range(alphabet - 1, 0, -1):
            edge -= 1 + (own[row, symbol] + prior[symbol]) * (TOTAL - alphabet) // whole
            edges[row, symbol] = edge
        edges[row, 0] = 0


@kernel(void(written(int64, 2), written(int64, 1), read(int32, 1)))
def _update(own: Any, shared: Any, column: Any) -> None:
    """:meth:`frequencies.Adaptive.update`."""
    rows, alphabet = own.shape
    for row in range(rows):
        for symbol in range(alphabet):
            own[row, symbol] -= own[row, symbol] >> MEMORY
        own[row, column[row]] += ONE
        shared[column[row]] += 2
