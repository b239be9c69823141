"""Numbers to levels of 1 to 8 bits and back, token by token: what all integers here have in common.

With numba installed, large bfloat16 tensors go through :mod:`~kvferry.codecs.kernels`; the bytes are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.codecs.base import LIMIT, Shape
from kvferry.codecs.checks import check_words, not_finite
from kvferry.codecs.packing import Bytes, Words, compiled, pack, unpack
from kvferry.codecs.side import bfloat16_of, finite, round_up, words_of
from kvferry.lazy import torch

_BLOCK = 1024
"""Tokens at a time on the plain path: what lies between input and payload stays in the processor's cache."""
_TURNED = 64
"""Tokens at a time where the order changes."""
_SMALLEST = 0x0080
"""Bits of the smallest normal bfloat16: below it, a scale's reciprocal may be beyond float32."""
_LARGEST = int(np.float32(LIMIT).view(np.uint32)) >> 16
"""Bits of the largest bfloat16 that is not beyond the limit."""


def quantize(layer: int, what: str, tensor: torch.Tensor, bits: int) -> tuple[Words, Bytes]:
    """``tensor`` ``[heads, n, d]`` to scales (bfloat16 as words, ``[heads, n]``) and levels ``[heads, n, d]``.

    ``layer`` and ``what`` are named where it is not finite.
    """
    heads, n, dim = tensor.shape
    words, levels = np.empty((heads, n), np.uint16), np.empty((heads, n, dim), np.uint8)
    if not _quantize_compiled(layer, what, tensor, bits, words, levels):
        rows, scales, out = tensor.reshape(-1, dim), words.reshape(-1), levels.reshape(-1, dim)
        for block in _blocks(len(rows)):
            scale, some = _levels(finite(layer, what, rows[block]), bits)
            scales[block], out[block] = words_of(scale.to(torch.bfloat16)), some.cpu().numpy()
    return words, levels


def quantize_packed(layer: int, what: str, tensor: torch.Tensor, bits: int) -> tuple[Words, Bytes]:
    """:func:`quantize`, with its levels packed one after the other: ``[packed_size]``."""
    heads, n, dim = tensor.shape
    if bits == 4:
        words, nibbles = np.empty((heads, n), np.uint16), np.empty((heads, n, dim // 2), np.uint8)
        if _quantize_compiled(layer, what, tensor, bits, words, nibbles):
            return words, nibbles.reshape(-1)
    words, levels = quantize(layer, what, tensor, bits)
    return words, pack(levels.reshape(-1), bits)


def restore(words: Words, levels: Bytes, bits: int, shape: Shape) -> torch.Tensor:
    """What :func:`quantize` gave, as numbers ``[heads, n, d]`` in bfloat16; scales that are none are refused."""
    check_words(words)
    out = torch.empty(shape, dtype=torch.bfloat16)
    if not _restore_compiled(words, levels, bits, out):
        rows, scales = out.view(-1, shape[2]), bfloat16_of(words.reshape(-1)).float()
        numbers = levels.reshape(-1, shape[2])
        for block in _blocks(len(rows)):
            some = torch.from_numpy(numbers[block].astype(np.float32))
            centred = some.mul_(2).sub_(1) if bits == 1 else some.sub_(2 ** (bits - 1))
            rows[block] = centred.mul_(scales[block, None])
    return out


def restore_packed(words: Words, packed: Bytes, bits: int, shape: Shape) -> torch.Tensor:
    """What :func:`quantize_packed` gave, as numbers ``[heads, n, d]`` in bfloat16; as :func:`restore`."""
    check_words(words)
    if bits == 4:
        out = torch.empty(shape, dtype=torch.bfloat16)
        if _restore_compiled(words, packed, bits, out):
            return out
    return restore(words, unpack(packed, bits, math.prod(shape)), bits, shape)


def by_channel(numbers: Bytes) -> Bytes:
    """``[heads, n, d]`` as ``[heads, d, n]``, or back."""
    heads, n, d = numbers.shape
    out = np.empty((heads, d, n), np.uint8)
    for start in range(0, n, _TURNED):
        out[:, :, start : start + _TURNED] = numbers[:, start : start + _TURNED].transpose(0, 2, 1)
    return out


def _levels(numbers: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales ``[n]`` and levels ``[n, d]`` (uint8) of ``[n, d]`` in float32."""
    if bits == 1:
        return round_up(numbers.abs().mean(-1, dtype=torch.float64).float()), (numbers >= 0).to(torch.uint8)
    half = 2 ** (bits - 1)
    scale = round_up(numbers.abs().amax(-1) / (half - 1))
    levels = (numbers / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-half, half - 1)
    return scale, levels.to(torch.int8).view(torch.uint8).add_(half)


def _quantize_compiled(layer: int, what: str, tensor: torch.Tensor, bits: int, words: Words, out: Bytes) -> bool:
    """Fill ``words`` and ``out``, an octet or a nibble a level; false where the plain path has to."""
    if bits == 1 or tensor.dtype != torch.bfloat16 or tensor.shape[2] % 2 or not (kernels := compiled(tensor.numel())):
        return False
    pairs = np.require(words_of(tensor).reshape(-1, tensor.shape[2]).view(np.uint32), requirements="A")
    if kernels.quantize(pairs.view(np.uint16), pairs, bits, words.reshape(-1), _pairs(out, pairs)) > _LARGEST:
        raise not_finite(layer, what)
    return not (words - np.uint16(1) < _SMALLEST - 1).any()


def _restore_compiled(words: Words, numbers: Bytes, bits: int, out: torch.Tensor) -> bool:
    """Fill ``out`` from an octet or a nibble a level; false where the plain path has to."""
    if bits == 1 or out.shape[2] % 2 or not (kernels := compiled(out.numel())):
        return False
    pairs = words_of(out).reshape(-1, out.shape[2]).view(np.uint32)
    kernels.restore(np.require(_pairs(numbers, pairs), requirements="A"), bits, words.reshape(-1), pairs)
    return True


def _pairs(numbers: Bytes, pairs: npt.NDArray[np.uint32]) -> npt.NDArray[Any]:
    """Levels of two numbers an element, as those lie in ``pairs``."""
    return numbers.reshape(-1).view(np.uint8 if numbers.size == pairs.size else np.uint16).reshape(pairs.shape)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))
