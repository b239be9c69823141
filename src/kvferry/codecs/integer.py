"""Per-token symmetric integers of 1 to 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from kvferry.cache import PromptLayout
from kvferry.codecs.base import LIMIT, Shape, check_size, not_finite
from kvferry.codecs.packing import Bytes, Words, join_words, pack, packed_size, split_words, unpack
from kvferry.errors import InputError


@dataclass(frozen=True)
class Integer:
    """One scale per token and head, ``s = max|t| / (2^(b-1) - 1)``, and ``q = round(t / s)``; ``b = 1`` keeps the sign
    and the mean magnitude.

    The quantizer of the sources (W.-L. Cheng and W. Liao, "Task-Aware KV-Cache Compression for Bandwidth-Efficient
    Collaborative LLM Inference", 2026). ``|t - q s| <= s / 2`` for every number. Decodes in float32 arithmetic to
    bfloat16.

    The scale is a bfloat16, rounded *up*: it has the range of the input, so it neither overflows nor underflows as a
    float16 would, and no number is clipped. That widens the step by under 0.8 %.

    Bytes: scales of keys and values (``[kv_heads, kept]`` each; high bytes, then low bytes), packed keys, packed
    values (``[kv_heads, head_dim, kept]``, ``q + 2^(b-1)``).

    Parameters
    ----------
    bits : int
        1 to 8, really packed: 3-bit numbers take 3 bits.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"integers of {self.bits} bits do not exist here; choose int1 to int8")

    @property
    def name(self) -> str:
        """``int`` and the bits."""
        return f"int{self.bits}"

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Raises :class:`~kvferry.errors.InputError` on NaN, infinity, or what bfloat16 cannot hold."""
        key_scales, key_numbers = self._quantize(layer, "keys", keys)
        value_scales, value_numbers = self._quantize(layer, "values", values)
        scales = split_words(np.concatenate([key_scales, value_scales]))
        return scales + key_numbers.tobytes() + value_numbers.tobytes()

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in bfloat16."""
        vectors = key_shape[0] * key_shape[1]
        scales_size = 2 * (vectors + value_shape[0] * value_shape[1])
        sizes = [scales_size, *(packed_size(math.prod(shape), self.bits) for shape in (key_shape, value_shape))]
        check_size(layer, payload, sum(sizes))
        octets = np.frombuffer(payload, np.uint8)
        scales, keys, values = (octets[a:b] for a, b in pairwise(np.cumsum([0, *sizes])))
        words = join_words(scales)
        return (
            self._restore(words[:vectors], keys, key_shape),
            self._restore(words[vectors:], values, value_shape),
        )

    def _quantize(self, layer: int, what: str, tensor: torch.Tensor) -> tuple[Words, Bytes]:
        """Scales (bfloat16 as words ``[kv_heads * kept]``) and packed numbers."""
        magnitude = tensor.float().abs()
        peak = magnitude.amax(-1)
        if not bool((peak <= LIMIT).all()):
            raise not_finite(layer, what)
        if self.bits == 1:
            scale = _round_up(magnitude.mean(-1, dtype=torch.float64).float())
            numbers = (tensor >= 0).to(torch.uint8)
        else:
            half = 2 ** (self.bits - 1)
            scale = _round_up(peak / (half - 1))
            step = torch.where(scale > 0, scale, 1.0)[..., None]
            numbers = (tensor.float() / step).round_().clamp_(-half, half - 1).add_(half).to(torch.uint8)
        words = scale.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
        by_channel = np.ascontiguousarray(numbers.cpu().numpy().transpose(0, 2, 1))
        return words.reshape(-1), pack(by_channel.reshape(-1), self.bits)

    def _restore(self, scales: Words, packed: Bytes, shape: Shape) -> torch.Tensor:
        """Numbers ``[kv_heads, kept, head_dim]`` in bfloat16."""
        heads, kept, dim = shape
        scale = torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16).float().reshape(heads, kept, 1)
        by_channel = unpack(packed, self.bits, math.prod(shape)).reshape(heads, dim, kept)
        numbers = torch.from_numpy(by_channel.transpose(0, 2, 1).astype(np.float32, order="C"))
        centred = numbers.mul_(2).sub_(1) if self.bits == 1 else numbers.sub_(2 ** (self.bits - 1))
        return centred.mul_(scale).to(torch.bfloat16)


def _round_up(scale: torch.Tensor) -> torch.Tensor:
    """The smallest bfloat16 not below ``scale`` (finite, not negative), still as float32."""
    return ((scale.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
