"""Adaptive binary range coding of a few thousand decisions, in whole numbers: exact on every machine."""

from __future__ import annotations

from collections.abc import Iterable

from kvferry.errors import CorruptError

_START = 1
STEP = 2
HALVE = 1 << 10
FULL = 1 << 32
LOW = 1 << 24

LEFT_OVER = "more bytes than the coded positions take"


class Weights:
    """What a coder expects of each context: two weights, of ones and of zeros.

    Both start at 1; a decision adds 2 to its side, which is the estimator of Krichevsky and Trofimov (1981). They are
    halved when they get heavy.
    """

    def __init__(self, contexts: int) -> None:
        self.ones = [_START] * contexts
        self.zeros = [_START] * contexts

    def copy(self) -> Weights:
        """For a trial that may be given up."""
        other = Weights(0)
        other.ones, other.zeros = list(self.ones), list(self.zeros)
        return other

    def part(self, context: int, span: int) -> int:
        """The share of ``span`` that stands for a one."""
        ones = self.ones[context]
        return span // (ones + self.zeros[context]) * ones

    def learn(self, context: int, bit: int) -> None:
        """The decision was ``bit``."""
        weights = self.ones if bit else self.zeros
        weights[context] += STEP
        if self.ones[context] + self.zeros[context] > HALVE:
            self.ones[context] = (self.ones[context] + 1) // 2
            self.zeros[context] = (self.zeros[context] + 1) // 2


def encode_bits(bits: Iterable[int], contexts: Iterable[int], weights: Weights) -> bytes:
    """``bits`` (0 or 1 each), each in its context, as bytes; ``weights`` learn.

    A range coder (G. N. N. Martin, "Range encoding", 1979). Zero bytes at the end are left out: the reader reads zeros
    beyond the end.
    """
    low, span, octets = 0, FULL, 4
    for bit, context in zip(bits, contexts, strict=True):
        part = weights.part(context, span)
        weights.learn(context, bit)
        if bit:
            span = part
        else:
            low, span = low + part, span - part
        while span < LOW:
            low, span, octets = low << 8, span << 8, octets + 1
    cut = next(cut for cut in range(octets, -1, -1) if -(-low >> 8 * cut) << 8 * cut < low + span)
    return (-(-low >> 8 * cut)).to_bytes(octets - cut)


class BitReader:
    """Gives back what :func:`encode_bits` was given, one decision at a time; any bytes decode to something."""

    def __init__(self, data: bytes, weights: Weights) -> None:
        self._weights = weights
        self._length = len(data)
        self._stream = iter(data)
        self._code = int.from_bytes(bytes(next(self._stream, 0) for _ in range(4)))
        self._span, self._octets = FULL, 4

    def read(self, context: int) -> int:
        """The next decision, in its context."""
        part = self._weights.part(context, self._span)
        bit = int(self._code < part)
        self._weights.learn(context, bit)
        if bit:
            self._span = part
        else:
            self._code, self._span = self._code - part, self._span - part
        while self._span < LOW:
            self._code = self._code << 8 | next(self._stream, 0)
            self._span, self._octets = self._span << 8, self._octets + 1
        return bit

    def finish(self) -> None:
        """:class:`~kvferry.errors.CorruptError` where bytes are left over."""
        if self._length > self._octets:
            raise CorruptError(LEFT_OVER)
