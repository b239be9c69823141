"""Numbers <-> bytes in the order a lossless stage likes best.

Codecs write channel by channel (``[heads, dim, kept]``), because one channel's numbers resemble each other more than
one token's do, and 16-bit numbers as all high bytes, then all low bytes; integers only where a lossless stage follows.
Zstd then takes 12 % less than in token order for BF16 on full caches of the testbed's cloud (untrained weights), 7 %
with a random quarter of the tokens. For integers it depends (shipped weights, ``benchmarks/order.py``): 3 % less for
INT4 with ``leaveout@0.1``, but 5 % more on full caches; the same within 0.5 % for INT8.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]

_PART = 1 << 16
"""Numbers at a time, so that they stay in the processor's cache."""
_WORTH = 1 << 16
"""Fewer numbers are done before compiled code is loaded."""


def compiled(count: int) -> Any:
    """:mod:`kvferry.codecs.kernels` for an array of so many numbers, or None: the plain path gives the same bytes."""
    return _kernels() if count >= _WORTH else None


@cache
def _kernels() -> Any:
    try:
        from kvferry.codecs import kernels
    except ImportError:
        return None
    return kernels


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` values of ``bits`` bits take: ``ceil(count * bits / 8)``."""
    return -(-count * bits // 8)


def pack(values: Bytes, bits: int) -> Bytes:
    """Really pack ``values`` (uint8 ``[m]``, each below ``2**bits``), least significant bits first.

    As many values as fill whole bytes, at most eight, are one word, in which halves move together until all meet.
    """
    if bits == 8:
        return values
    out = np.empty(packed_size(len(values), bits), np.uint8)
    lanes, kept = _word(bits)
    for start in range(0, len(values), _PART):
        words = _padded(values[start : start + _PART], lanes).view(f"<u{lanes}").reshape(-1)
        for first, near, _, apart in _steps(bits):
            words = words & first | words >> apart & near
        octets = np.empty((len(words), kept), np.uint8)
        for i in range(kept):
            octets[:, i] = words >> words.dtype.type(8 * i)
        part = out[start * bits // 8 : (start + _PART) * bits // 8]
        part[:] = octets.reshape(-1)[: len(part)]
    return out


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The ``count`` values (uint8) in ``packed``, which has ``packed_size(count, bits)`` bytes."""
    if bits == 8:
        return packed
    out = np.empty(count, np.uint8)
    lanes, kept = _word(bits)
    for start in range(0, count, _PART):
        octets = _padded(packed[start * bits // 8 : (start + _PART) * bits // 8], kept)
        words = octets[:, 0].astype(f"<u{lanes}")
        for i in range(1, kept):
            words |= octets[:, i].astype(words.dtype) << words.dtype.type(8 * i)
        for first, _, far, apart in reversed(_steps(bits)):
            words = words & first | words << apart & far
        part = out[start : start + _PART]
        part[:] = words.view(np.uint8)[: len(part)]
    return out


def _word(bits: int) -> tuple[int, int]:
    """How many values fill whole bytes, and how many bytes."""
    lanes = 8 // math.gcd(bits, 8)
    return lanes, bits * lanes // 8


@cache
def _steps(bits: int) -> list[tuple[Any, ...]]:
    """How the values of a word, a byte each, move together, step by step.

    Each step joins two fields: bits of the first, of the second after and before it, and how far that is moved.
    """
    lanes, _ = _word(bits)
    kind, steps = np.dtype(f"u{lanes}").type, []
    for width in (8 << i for i in range(lanes.bit_length() - 1)):
        full = width * bits // 8
        first = sum((1 << full) - 1 << at for at in range(0, 8 * lanes, 2 * width))
        steps.append((kind(first), kind(first << full), kind(first << width), kind(width - full)))
    return steps


def split_words(words: Words) -> bytes:
    """All high bytes, then all low bytes."""
    octets = np.empty((2, *words.shape), np.uint8)
    octets[0] = words >> 8
    octets[1] = words.astype(np.uint8)
    return octets.tobytes()


def join_words(octets: Bytes) -> Words:
    """Undo :func:`split_words`."""
    high, low = octets.reshape(2, -1)
    words = high.astype(np.uint16)
    words <<= 8
    words |= low
    return words


def _padded(values: Bytes, lanes: int) -> Bytes:
    """``values`` as ``[groups, lanes]``, filled up with zeros."""
    missing = -len(values) % lanes
    if missing:
        values = np.concatenate([values, np.zeros(missing, np.uint8)])
    return np.ascontiguousarray(values).reshape(-1, lanes)
