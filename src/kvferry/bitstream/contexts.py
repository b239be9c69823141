"""Positions by an adaptive binary range coder: one decision a token, kept or not, in its context."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvferry.errors import CorruptError

Mask = npt.NDArray[np.bool_]
MOST = 1 << 12
"""Rows times tokens that one frame may code so: a decision takes about a microsecond."""

_START = 1
_STEP = 2
_HALVE = 1 << 10
_FULL = 1 << 32
_LOW = 1 << 24
_UNGUIDED = 2


class Contexts:
    """The state that writer and reader of one stream share: two weights for each of 24 contexts.

    The context of a token is ``8 g + 4 e + 2 b + v``: ``g`` says whether the frame before kept the token in the same
    row (2 for the stream's first frame), ``e`` whether any earlier row of this frame does, ``b`` whether this row
    keeps the token before, ``v`` whether the token is visual. Tokens that earlier frames of the layer hold are no
    decisions.
    """

    def __init__(self, visual: Mask) -> None:
        self.kept = [_START] * 24
        self.dropped = [_START] * 24
        self._visual = visual

    def copy(self) -> Contexts:
        """For a trial that may be given up."""
        other = Contexts(self._visual)
        other.kept, other.dropped = list(self.kept), list(self.dropped)
        return other

    def encode(self, mask: Mask, held: Mask, guide: Mask | None) -> bytes:
        """The bits of ``mask`` (``[rows, length]``) outside ``held`` (of the same shape, disjoint)."""
        low, span, octets = 0, _FULL, 4
        for row, bits in enumerate(mask):
            before = np.concatenate([[False], bits[:-1]])
            contexts = self._fixed(row, mask, guide) + 2 * before
            open_ = ~held[row]
            for context, bit in zip(contexts[open_].tolist(), bits[open_].tolist(), strict=True):
                part = self._part(context, span)
                self._learn(context, bit)
                if bit:
                    span = part
                else:
                    low, span = low + part, span - part
                while span < _LOW:
                    low, span, octets = low << 8, span << 8, octets + 1
        return _shortest(low, span, octets)

    def decode(self, data: bytes, held: Mask, guide: Mask | None) -> Mask:
        """What :meth:`encode` was given; any bytes decode to something, but none may be left over."""
        mask = np.zeros_like(held)
        stream = iter(data)
        code, span, octets = int.from_bytes(bytes(next(stream, 0) for _ in range(4))), _FULL, 4
        for row, closed in enumerate(held.tolist()):
            bit = False
            bits = mask[row]
            for place, fixed in enumerate(self._fixed(row, mask, guide).tolist()):
                if closed[place]:
                    bit = False
                    continue
                context = fixed + 2 * bit
                part = self._part(context, span)
                bit = code < part
                self._learn(context, bit)
                if bit:
                    span = part
                    bits[place] = True
                else:
                    code, span = code - part, span - part
                while span < _LOW:
                    code, span, octets = code << 8 | next(stream, 0), span << 8, octets + 1
        if len(data) > octets:
            raise CorruptError("more bytes than the coded positions take")
        return mask

    def _fixed(self, row: int, mask: Mask, guide: Mask | None) -> npt.NDArray[np.int64]:
        """The part of the contexts of a row, ``[length]``, that does not depend on the row itself."""
        if guide is None:
            guided = np.full(mask.shape[1], _UNGUIDED)
        else:
            guided = guide[min(row, len(guide) - 1)].astype(np.int64)
        fixed: npt.NDArray[np.int64] = 8 * guided + 4 * mask[:row].any(0) + self._visual
        return fixed

    def _part(self, context: int, span: int) -> int:
        """The share of ``span`` that stands for a kept token."""
        kept = self.kept[context]
        return span // (kept + self.dropped[context]) * kept

    def _learn(self, context: int, bit: bool) -> None:
        weights = self.kept if bit else self.dropped
        weights[context] += _STEP
        if self.kept[context] + self.dropped[context] > _HALVE:
            self.kept[context] = (self.kept[context] + 1) // 2
            self.dropped[context] = (self.dropped[context] + 1) // 2


def _shortest(low: int, span: int, octets: int) -> bytes:
    """The shortest bytes that, with zeros behind, are a number in ``[low, low + span)`` of ``octets`` bytes."""
    cut = next(cut for cut in range(octets, -1, -1) if -(-low >> 8 * cut) << 8 * cut < low + span)
    return (-(-low >> 8 * cut)).to_bytes(octets - cut)
