"""The inner loops of integer codecs, compiled by numba: the same bytes as the plain path.

Only :func:`~kvferry.codecs.packing.compiled` imports this module, where the package numba is installed.

A payload is channel-major and a cache is token-major, so both directions are a transposition. Tokens go in blocks of
64, which stay in the processor's first cache. Four tokens' levels of one channel make one 32-bit word: with a channel
in each vector lane, shifting and adding transposes without moving a lane. No loop narrows its result to bytes or
16-bit words as it stores, which costs current processors more than the arithmetic. What remains are 64-bit words at
any address, eight a channel.

One loop writes one array, and slices are made outside of loops: only then LLVM's run-time checks let vectors through.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int32, int64, njit, uint16, uint32, uint64, void
from numba.core import types
from numba.extending import intrinsic

from kvferry.codecs.jit import kernel, read, written

_BLOCK = 64
_GROUPS = _BLOCK // 4
_MAGIC = 1.5 * 2**23
"""Added to a float32 of small magnitude, it leaves that number, rounded half to even, in the lowest bits."""
_MAGIC_WORD = 0x8B400000
"""What the magic's own bits (``0x4B400000``) add to a word of four levels: ``sum of bits << 8 i``, modulo ``2**32``."""

_part = njit(nogil=True, error_model="numpy")
_inlined = njit(inline="always")


@intrinsic
def _load(context: Any, address: Any) -> Any:
    """The 64-bit word at any address, aligned or not."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()), align=1)

    return types.uint64(types.uint64), code


@intrinsic
def _store(context: Any, address: Any, word: Any) -> Any:
    """Write a 64-bit word to any address, aligned or not."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), code


@intrinsic
def _float(context: Any, bits: Any) -> Any:
    """The float32 of these bits."""
    return types.float32(types.uint32), lambda c, builder, s, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
def _bits(context: Any, number: Any) -> Any:
    """The bits of this float32."""
    return types.uint32(types.float32), lambda c, builder, s, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@_inlined
def _scale(peak: Any, top: Any) -> Any:
    """``peak / top``, rounded up to a bfloat16's 16 bits."""
    return (_bits(_float(uint32(peak) << uint32(16)) / top) + uint32(0xFFFF)) >> uint32(16)


@_part
def _levels(x: Any, start: Any, bits: Any, words: Any, divisors: Any, groups: Any) -> Any:
    """Scales of 64 tokens from ``start`` on, to ``words``, and their levels, to ``groups``; gives the largest bits."""
    for t in range(_BLOCK):
        peak = uint16(0)
        for c in range(x.shape[1]):
            size = uint16(x[start + t, c] & uint16(0x7FFF))
            peak = size if size > peak else peak
        words[start + t] = peak
    half = 1 << (bits - 1)
    most = uint16(0)
    for t in range(_BLOCK):
        peak = words[start + t]
        most = peak if peak > most else most
        word = _scale(peak, float32(half - 1))
        words[start + t] = word
        divisors[t] = _float(word << uint32(16)) if word else float32(1)
    shift = float32(_MAGIC) + float32(half)
    for group in range(_GROUPS):
        for c in range(x.shape[1]):
            four = uint32(0)
            for i in range(4):
                number = _float(uint32(x[start + 4 * group + i, c]) << uint32(16))
                four += _bits(number / divisors[4 * group + i] + shift) << uint32(8 * i)
            groups[group, c] = four - uint32(_MAGIC_WORD)
    return most


@_part
def _by_channel(groups: Any, out: Any, start: Any) -> None:
    """64 tokens' levels to columns ``start`` and on of ``out``."""
    dim, kept = out.shape
    base = uint64(out.ctypes.data) + uint64(start)
    for c in range(dim):
        row = base + uint64(c * kept)
        for k in range(_GROUPS // 2):
            eight = uint64(groups[2 * k, c]) | uint64(groups[2 * k + 1, c]) << uint64(32)
            _store(row + uint64(8 * k), eight)


@kernel(uint16(read(uint16, 2), int64, written(uint16, 1), written(types.uint8, 2)))
def quantize(x: Any, bits: Any, words: Any, out: Any) -> Any:
    """Scales and levels of one head; gives the largest magnitude among its numbers, as a bfloat16's bits.

    ``x`` (uint16 ``[n, d]``, a bfloat16's bits), ``bits`` 2 to 8, ``words`` (uint16 ``[n]``) and ``out`` (uint8
    ``[d, n]``) are in C order; the last two are written. Worthless where a number is not finite: the result tells.
    """
    kept, dim = x.shape
    divisors = np.empty(_BLOCK, np.float32)
    groups = np.empty((_GROUPS, dim), np.uint32)
    most = uint16(0)
    whole = kept // _BLOCK * _BLOCK
    for start in range(0, whole, _BLOCK):
        most = max(most, _levels(x, start, bits, words, divisors, groups))
        _by_channel(groups, out, start)
    if whole < kept:
        rest = np.zeros((_BLOCK, dim), np.uint16)
        for t in range(kept - whole):
            for c in range(dim):
                rest[t, c] = x[whole + t, c]
        rest_words = np.empty(_BLOCK, np.uint16)
        rest_out = np.empty((dim, _BLOCK), np.uint8)
        most = max(most, _levels(rest, 0, bits, rest_words, divisors, groups))
        _by_channel(groups, rest_out, 0)
        for t in range(kept - whole):
            words[whole + t] = rest_words[t]
        for c in range(dim):
            for t in range(kept - whole):
                out[c, whole + t] = rest_out[c, t]
    return most


@_part
def _by_token(numbers: Any, start: Any, fours: Any) -> None:
    """Levels of columns ``start`` and on, four tokens a word: even channels, then odd ones."""
    dim, kept = numbers.shape
    base = uint64(numbers.ctypes.data) + uint64(start)
    for pair in range(dim // 2):
        row = base + uint64(2 * pair * kept)
        for k in range(_GROUPS // 2):
            even, odd = _load(row + uint64(8 * k)), _load(row + uint64(kept + 8 * k))
            fours[2 * k, 0, pair], fours[2 * k, 1, pair] = uint32(even), uint32(odd)
            fours[2 * k + 1, 0, pair] = uint32(even >> uint64(32))
            fours[2 * k + 1, 1, pair] = uint32(odd >> uint64(32))


@_inlined
def _two(even: Any, odd: Any, shift: Any, minus: Any, scale: Any) -> Any:
    """Two channels' numbers of one token, as two bfloat16."""
    low = float32(int32((even >> shift) & uint32(255)) - minus) * scale
    high = float32(int32((odd >> shift) & uint32(255)) - minus) * scale
    return _rounded(low) >> uint32(16) | _rounded(high) & uint32(0xFFFF0000)


@_inlined
def _rounded(number: Any) -> Any:
    """Bits of a float32 whose upper half is the nearest bfloat16, ties to even."""
    bits = _bits(number)
    return uint32(bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1)))


@_part
def _numbers(fours: Any, scales: Any, minus: Any, out: Any, start: Any) -> None:
    """``(level - minus) * scale`` of 64 tokens, two channels a word; ``fours`` is what :func:`_by_token` gave."""
    for t in range(_BLOCK):
        shift, scale = uint32(8 * (t & 3)), scales[start + t]
        for pair in range(out.shape[1]):
            out[start + t, pair] = _two(fours[t >> 2, 0, pair], fours[t >> 2, 1, pair], shift, minus, scale)


@kernel(void(read(types.uint8, 2), int64, read(uint16, 1), written(uint32, 2)))
def restore(numbers: Any, bits: Any, words: Any, out: Any) -> None:
    """One head again: ``numbers`` (uint8 ``[d, n]``, ``d`` even) and ``words`` (uint16 ``[n]``, finite bfloat16) to
    ``out`` (uint32 ``[n, d / 2]``, two bfloat16 each), all in C order; ``bits`` is 2 to 8."""
    dim, kept = numbers.shape
    minus = int32(1 << (bits - 1))
    fours = np.empty((_GROUPS, 2, dim // 2), np.uint32)
    scales = np.zeros(kept + _BLOCK, np.float32)
    for t in range(kept):
        scales[t] = _float(uint32(words[t]) << uint32(16))
    whole = kept // _BLOCK * _BLOCK
    for start in range(0, whole, _BLOCK):
        _by_token(numbers, start, fours)
        _numbers(fours, scales, minus, out, start)
    if whole < kept:
        rest = np.zeros((dim, _BLOCK), np.uint8)
        for c in range(dim):
            for t in range(kept - whole):
                rest[c, t] = numbers[c, whole + t]
        rest_out = np.empty((_BLOCK, dim // 2), np.uint32)
        _by_token(rest, 0, fours)
        _numbers(fours, scales[whole:], minus, rest_out, 0)
        for t in range(kept - whole):
            for pair in range(dim // 2):
                out[whole + t, pair] = rest_out[t, pair]


@_inlined
def _squeezed(eight: Any) -> Any:
    """Eight bytes below 16 as 32 bits."""
    two = (eight | eight >> uint64(4)) & uint64(0x00FF00FF00FF00FF)
    four = (two | two >> uint64(8)) & uint64(0x0000FFFF0000FFFF)
    return (four | four >> uint64(16)) & uint64(0xFFFFFFFF)


@_inlined
def _widened(word: Any) -> Any:
    """Undo :func:`_squeezed`."""
    four = (word | word << uint64(16)) & uint64(0x0000FFFF0000FFFF)
    two = (four | four << uint64(8)) & uint64(0x00FF00FF00FF00FF)
    return (two | two << uint64(4)) & uint64(0x0F0F0F0F0F0F0F0F)


@kernel(void(read(uint64, 1), written(uint64, 1)))
def pack4(eights: Any, out: Any) -> None:
    """Sixteen values of 4 bits a word: ``eights`` (uint64 ``[2 m]``, a value a byte) to ``out`` (uint64 ``[m]``)."""
    for i in range(len(out)):
        out[i] = _squeezed(eights[2 * i]) | _squeezed(eights[2 * i + 1]) << uint64(32)


@kernel(void(read(uint64, 1), written(uint64, 1)))
def unpack4(packed: Any, out: Any) -> None:
    """Undo :func:`pack4`."""
    for i in range(len(packed)):
        out[2 * i] = _widened(packed[i] & uint64(0xFFFFFFFF))
        out[2 * i + 1] = _widened(packed[i] >> uint64(32))
