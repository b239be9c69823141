"""Adaptive binary arithmetic coding of a few hundred to a few thousand decisions, exact on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_TOP = 1 << 24
_WIDE = (1 << 32) - 1
_UNIT = 1 << 12
_MOST = 250


class _Model:
    """How often a decision fell out as one, per context: the estimator of Krichevsky and Trofimov (1981).

    Counts are halved when they reach ``_MOST``, so that probabilities stay whole numbers of 12 bits.
    """

    def __init__(self, contexts: int) -> None:
        self._ones = [1] * contexts
        self._both = [2] * contexts

    def share(self, context: int) -> int:
        """Probability of a one in units of ``1 / _UNIT``, never 0 and never 1."""
        return min(max(_UNIT * self._ones[context] // self._both[context], 1), _UNIT - 1)

    def learn(self, context: int, bit: int) -> None:
        """The decision was ``bit``; it counts twice, what is assumed before the first counts once for each side."""
        self._ones[context] += 2 * bit
        self._both[context] += 2
        if self._both[context] > _MOST:
            self._ones[context] = (self._ones[context] + 1) >> 1
            self._both[context] = max((self._both[context] + 1) >> 1, self._ones[context] + 1)


def encode_bits(bits: Sequence[int], contexts: Iterable[int], count: int) -> bytes:
    """``bits`` (0 or 1 each) as bytes; ``contexts`` gives for each the context, below ``count``, it is expected in.

    A range coder with carry propagation (G. N. N. Martin, "Range encoding", 1979, in the byte-wise form of I. Pavlov's
    LZMA). Zero bytes at the end are left out: the decoder reads zeros beyond the end.
    """
    model, out = _Model(count), bytearray()
    low, width = 0, _WIDE
    for bit, context in zip(bits, contexts, strict=True):
        bound = (width >> 12) * model.share(context)
        if bit:
            width = bound
        else:
            low += bound
            width -= bound
        model.learn(context, bit)
        while width < _TOP:
            low = _shift(low, out)
            width <<= 8
    low = _shortest(low, width)
    for _ in range(4):
        low = _shift(low, out)
    return bytes(out).rstrip(b"\0")


def _shortest(low: int, width: int) -> int:
    """Of the numbers in ``[low, low + width)`` one with as many zero bytes at its end as possible."""
    for zeros in (24, 16, 8):
        rounded = -(-low >> zeros) << zeros
        if rounded < low + width:
            return rounded
    return low


def _shift(low: int, out: bytearray) -> int:
    """Move the highest byte of ``low`` to ``out``, and a carry into what is there already."""
    if low > _WIDE:
        where = len(out) - 1
        while out[where] == 0xFF:
            out[where] = 0
            where -= 1
        out[where] += 1
        low &= _WIDE
    out.append(low >> 24)
    return (low << 8) & _WIDE


class BitReader:
    """Gives back what :func:`encode_bits` was given, one decision at a time."""

    def __init__(self, data: bytes, count: int) -> None:
        self._model = _Model(count)
        self._data = data
        self._where = 4
        self._code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")
        self._width = _WIDE

    def read(self, context: int) -> int:
        """The next decision, in its context."""
        bound = (self._width >> 12) * self._model.share(context)
        bit = int(self._code < bound)
        if bit:
            self._width = bound
        else:
            self._code -= bound
            self._width -= bound
        self._model.learn(context, bit)
        while self._width < _TOP:
            byte = self._data[self._where] if self._where < len(self._data) else 0
            self._code = ((self._code << 8) | byte) & _WIDE
            self._where += 1
            self._width <<= 8
        return bit
