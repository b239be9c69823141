"""The loops of :mod:`kvferry.codecs.activity`, compiled by numba: the same numbers.

Only :mod:`kvferry.codecs.transform` imports this one, where the package numba is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import int32, int64, void

from kvferry.codecs import activity
from kvferry.codecs.activity import FARTHEST, LARGEST, Numbers, edges, shares
from kvferry.codecs.densities import LOWEST, SCALES
from kvferry.codecs.frequencies import ONE
from kvferry.codecs.jit import kernel, read, written


class Activity(activity.Activity):
    """See there."""

    def groups(self, octaves: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        order, counts = np.empty(len(octaves) * len(self._seen), np.int64), np.zeros(SCALES, np.int64)
        _groups(np.ascontiguousarray(octaves), self._seen, self._expected, edges(), order, counts)
        which = counts.nonzero()[0]
        return order, counts[which], which

    def update(self, rows: npt.NDArray[np.uint8], symbols: npt.NDArray[np.int32]) -> None:
        _update(np.ascontiguousarray(shares()[rows]), np.ascontiguousarray(symbols), self._seen, self._expected)


@kernel(void(read(int64, 2), read(int64, 1), read(int64, 1), read(int64, 1), written(int64, 1), written(int64, 1)))
def _groups(octaves: Any, seen: Any, expected: Any, edges: Any, order: Any, counts: Any) -> None:
    """:meth:`activity.Activity.groups`; sorts by counting."""
    tokens, each = len(seen), octaves.shape[1] > 1
    larger, models = np.empty(tokens, np.int64), np.empty(len(order), np.int64)
    for token in range(tokens):
        ratio = ((seen[token] + ONE) << 16) // (expected[token] + ONE)
        larger[token] = np.searchsorted(edges, ratio, side="right") - FARTHEST
    for i in range(len(octaves)):
        for token in range(tokens):
            model = min(max(octaves[i, token if each else 0] + larger[token] - LOWEST, 0), SCALES - 1)
            models[i * tokens + token] = model
            counts[model] += 1
    starts = np.cumsum(counts) - counts
    for k in range(len(order)):
        order[starts[models[k]]] = k
        starts[models[k]] += 1


@kernel(void(read(int64, 2), read(int32, 2), written(int64, 1), written(int64, 1)))
def _update(share: Any, symbols: Any, seen: Any, expected: Any) -> None:
    """:meth:`activity.Activity.update`."""
    each = share.shape[1] > 1
    for i in range(len(share)):
        for token in range(len(seen)):
            part = share[i, token if each else 0]
            seen[token] += min(abs(int64(symbols[i, token])) * part, LARGEST * (ONE - part))
            expected[token] += ONE - part
