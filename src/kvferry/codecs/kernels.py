"""The inner loops of integer codecs, compiled by numba: the same bytes as the plain path.

Only :func:`~kvferry.codecs.packing.compiled` imports this module, where the package numba is installed.

Two bfloat16 numbers are read as one 32-bit word, a vector lane each, and their two levels are stored as one element: no
lane moves, and only the store narrows. That arrays are of two types makes their shift a constant for LLVM. Sums and
shifts are cut to 32 bits one by one, because numba widens them, which would halve the lanes.

No number is divided. A quotient ``t / s`` of two bfloat16, with ``|t / s| <= 128``, is a tie between two whole numbers
or at least ``2**-10`` from every tie, because both have 8 significant bits. The product with a reciprocal is less than
``2**-14`` from the quotient; rounded to multiples of ``2**-11``, it is that tie or on the same side of it.

A loop writes to one array only, so that LLVM's run-time checks let vectors through.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int64, njit, uint8, uint16, uint32, void
from numba.core import types
from numba.extending import intrinsic

from kvferry.codecs.jit import kernel, read, written

_BLOCK = 64
"""Tokens at a time: what lies between stays in the processor's first cache."""
_NEAR = 1.5 * 2**12
"""Added to a float32 of magnitude up to 2048, it leaves that number, rounded to multiples of ``2**-11``."""
_WHOLE = 1.5 * 2**23
"""Added to a float32 of small magnitude, it leaves that number, rounded half to even, in the lowest bits."""
_WHOLE_BITS = 0x4B400000
_FLOAT_BITS = 0x4B000000
"""Bits of ``2**23``: with a small whole number in the lowest bits, they are the float32 ``2**23`` more than it."""

_part = njit(nogil=True, error_model="numpy")
_inlined = njit(inline="always")


@intrinsic
def _float(context: Any, bits: Any) -> Any:
    """The float32 of these bits."""
    return types.float32(types.uint32), lambda c, builder, s, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
def _bits(context: Any, number: Any) -> Any:
    """The bits of this float32."""
    return types.uint32(types.float32), lambda c, builder, s, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@_part
def _peaks(x: Any, words: Any, start: Any, stop: Any) -> None:
    """Largest magnitude of each token from ``start`` to ``stop``, to ``words``."""
    for t in range(start, stop):
        peak = uint16(0)
        for c in range(x.shape[1]):
            size = uint16(x[t, c] & uint16(0x7FFF))
            peak = size if size > peak else peak
        words[t] = peak


@_part
def _scales(words: Any, top: Any, reciprocals: Any, start: Any, stop: Any) -> Any:
    """Peaks over ``top``, rounded up to bfloat16, in their place, and reciprocals of those; gives the largest peak."""
    most = uint16(0)
    for t in range(start, stop):
        peak = words[t]
        most = peak if peak > most else most
        word = (_bits(_float(uint32(peak) << uint32(16)) / top) + uint32(0xFFFF)) >> uint32(16)
        words[t] = word
        reciprocals[t - start] = float32(1) / _float(uint32(word << uint32(16))) if word else float32(1)
    return most


@_part
def _levels(pairs: Any, reciprocals: Any, half: Any, out: Any, start: Any, stop: Any) -> None:
    """Levels of the tokens from ``start`` to ``stop``, two an element of ``out``."""
    shift = uint32(np.iinfo(out.dtype).bits // 2)
    near, whole = float32(_NEAR), float32(_WHOLE - _NEAR + half)
    away = uint32(uint32(_WHOLE_BITS) + uint32(uint32(_WHOLE_BITS) << shift))
    for t in range(start, stop):
        reciprocal = reciprocals[t - start]
        for p in range(pairs.shape[1]):
            even = _float(uint32(pairs[t, p] << uint32(16))) * reciprocal + near + whole
            odd = _float(pairs[t, p] & uint32(0xFFFF0000)) * reciprocal + near + whole
            out[t, p] = uint32(_bits(even) + uint32(uint32(_bits(odd) << shift) - away))


def _quantize(out: Any) -> Any:
    return uint16(read(uint16, 2), read(uint32, 2), int64, written(uint16, 1), written(out, 2))


@kernel(_quantize(uint8), _quantize(uint16))
def quantize(x: Any, pairs: Any, bits: Any, words: Any, out: Any) -> Any:
    """Scales and levels of tokens; gives the largest magnitude among their numbers, as a bfloat16's bits.

    ``x`` (uint16 ``[n, d]``, a bfloat16's bits) is read as ``pairs`` (uint32 ``[n, d / 2]``), too; ``bits`` is 2 to 8,
    up to 4 for ``out`` of uint8. ``words`` (uint16 ``[n]``) and ``out`` (``[n, d / 2]``) are written, a token's
    ``2 i``-th level in the lower half of element ``i``. Worthless where a number is not finite, which the result
    tells, or where the reciprocal of a scale is not, which the scales tell.
    """
    half = 1 << (bits - 1)
    reciprocals = np.empty(_BLOCK, np.float32)
    most = uint16(0)
    for start in range(0, len(x), _BLOCK):
        stop = min(start + _BLOCK, len(x))
        _peaks(x, words, start, stop)
        most = max(most, _scales(words, float32(half - 1), reciprocals, start, stop))
        _levels(pairs, reciprocals, half, out, start, stop)
    return most


@_inlined
def _rounded(number: Any) -> Any:
    """Bits of a float32 whose upper half is the nearest bfloat16, ties to even."""
    bits = _bits(number)
    return uint32(bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1)))


def _restore(levels: Any) -> Any:
    return void(read(levels, 2), int64, read(uint16, 1), written(uint32, 2))


@kernel(_restore(uint8), _restore(uint16))
def restore(levels: Any, bits: Any, words: Any, pairs: Any) -> None:
    """Undo :func:`quantize`: its ``out`` and ``words`` (finite bfloat16) to ``pairs``."""
    shift = uint32(np.iinfo(levels.dtype).bits // 2)
    lower = uint32((1 << shift) - 1)
    centre = float32(2**23 + (1 << (bits - 1)))
    for t in range(len(pairs)):
        scale = _float(uint32(uint32(words[t]) << uint32(16)))
        for p in range(pairs.shape[1]):
            two = uint32(levels[t, p])
            even = _rounded((_float((two & lower) | uint32(_FLOAT_BITS)) - centre) * scale)
            odd = _rounded((_float((two >> shift) | uint32(_FLOAT_BITS)) - centre) * scale)
            pairs[t, p] = even >> uint32(16) | odd & uint32(0xFFFF0000)
