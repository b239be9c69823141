"""Positions by an adaptive binary range coder: one decision a token, kept or not, in its context."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.bitstream.binary import LEFT_OVER, BitReader, Weights, encode_bits
from kvferry.errors import CorruptError
from kvferry.patience import step

Mask = npt.NDArray[np.bool_]
MOST = 1 << 12
"""Rows times tokens that one frame may code so: a decision takes about a microsecond."""

_UNGUIDED = 2
_WORTH = 1 << 16
"""Decisions that a stream makes before compiled code is loaded for them, which takes about as long."""


@cache
def kernels() -> Any:
    """Compiled decisions, or None: the plain path makes the same. A server loads them beforehand."""
    try:
        from kvferry.bitstream import binary_kernels
    except ImportError:
        return None
    return binary_kernels


class Contexts:
    """The state that writer and reader of one stream share: two weights for each of 24 contexts.

    The context of a token is ``8 g + 4 e + 2 b + v``: ``g`` says whether the frame before kept the token in the same
    row (2 for the stream's first frame), ``e`` whether any earlier row of this frame does, ``b`` whether this row
    keeps the token before, ``v`` whether the token is visual. Tokens that earlier frames of the layer hold are no
    decisions.
    """

    def __init__(self, visual: Mask, weights: Weights | None = None) -> None:
        self._visual = visual
        self._weights = weights or Weights(24)
        self._decisions = 0

    def copy(self) -> Contexts:
        """For a trial that may be given up."""
        return Contexts(self._visual, self._weights.copy())

    def encode(self, mask: Mask, held: Mask, guide: Mask | None) -> bytes:
        """The bits of ``mask`` (``[rows, length]``) outside ``held`` (of the same shape, disjoint)."""
        before = np.pad(mask[:, :-1], ((0, 0), (1, 0)))
        fixed = [self._fixed(row, mask, guide) for row in range(len(mask))]
        contexts = np.array(fixed, np.int64).reshape(mask.shape) + 2 * before
        open_ = ~held
        return encode_bits(mask[open_].tolist(), contexts[open_].tolist(), self._weights)

    def decode(self, data: bytes, held: Mask, guide: Mask | None) -> Mask:
        """What :meth:`encode` was given; any bytes decode to something, but none may be left over."""
        mask = np.zeros_like(held)
        self._decisions += held.size
        loaded = kernels.cache_info().currsize or self._decisions > _WORTH
        if loaded and (compiled := kernels()) is not None:
            self._decide(compiled, np.frombuffer(data, np.uint8), held, guide, mask)
            return mask
        reader = BitReader(data, self._weights)
        for row, closed in enumerate(held.tolist()):
            step()
            bit = 0
            for place, fixed in enumerate(self._fixed(row, mask, guide).tolist()):
                bit = 0 if closed[place] else reader.read(fixed + 2 * bit)
                mask[row, place] = bit
        reader.finish()
        return mask

    def _decide(self, compiled: Any, data: npt.NDArray[np.uint8], held: Mask, guide: Mask | None, mask: Mask) -> None:
        """Fill ``mask``."""
        state, weights = np.array(compiled.start(data), np.int64), self._weights
        ones, zeros = np.array(weights.ones, np.int64), np.array(weights.zeros, np.int64)
        out = mask.view(np.uint8)
        for row, closed in enumerate(np.ascontiguousarray(held).view(np.uint8)):
            fixed = np.ascontiguousarray(self._fixed(row, mask, guide), np.int64)
            compiled.decide(data, state, ones, zeros, fixed, closed, out[row])
        weights.ones, weights.zeros = ones.tolist(), zeros.tolist()
        if len(data) > state[2]:
            raise CorruptError(LEFT_OVER)

    def _fixed(self, row: int, mask: Mask, guide: Mask | None) -> npt.NDArray[np.int64]:
        """The part of the contexts of a row, ``[length]``, that does not depend on the row itself."""
        if guide is None:
            guided = np.full(mask.shape[1], _UNGUIDED)
        else:
            guided = guide[min(row, len(guide) - 1)].astype(np.int64)
        fixed: npt.NDArray[np.int64] = 8 * guided + 4 * mask[:row].any(0) + self._visual
        return fixed
