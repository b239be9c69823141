"""Per-token symmetric integers of 1 to 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch

from kvferry.cache import PromptLayout
from kvferry.codecs.base import Shape, check_size
from kvferry.codecs.packing import Bytes, Words, join_words, pack, packed_size, split_words, unpack
from kvferry.codecs.side import What, bfloat16_of, finite, round_up
from kvferry.errors import InputError

_BLOCK = 1024
"""Tokens of one head at a time: what lies between input and payload stays in the processor's cache."""


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
        return b"".join([split_words(np.concatenate([key_scales, value_scales])), key_numbers.data, value_numbers.data])

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

    def encode_side(self, layer: int, what: What, tensor: torch.Tensor, positions: torch.Tensor) -> bytes:
        """Scales, then numbers; see :class:`~kvferry.codecs.side.Side`."""
        scales, numbers = self._quantize(layer, what, tensor)
        return b"".join([split_words(scales), numbers.data])

    def side_size(self, what: What, shape: Shape, positions: torch.Tensor) -> int:
        """Two bytes a scale, and the packed numbers."""
        return 2 * shape[0] * shape[1] + packed_size(math.prod(shape), self.bits)

    def decode_side(self, what: What, octets: Bytes, shape: Shape, positions: torch.Tensor) -> torch.Tensor:
        """See :class:`~kvferry.codecs.side.Side`."""
        split = 2 * shape[0] * shape[1]
        return self._restore(join_words(octets[:split]), octets[split:], shape)

    def _quantize(self, layer: int, what: str, tensor: torch.Tensor) -> tuple[Words, Bytes]:
        """Scales (bfloat16 as words ``[kv_heads * kept]``) and packed numbers."""
        heads, kept, dim = tensor.shape
        scales = torch.empty(heads, kept)
        by_channel = np.empty((heads, dim, kept), np.uint8)
        for head, start in product(range(heads), range(0, kept, _BLOCK)):
            block = slice(start, start + _BLOCK)
            scale, numbers = self._levels(finite(layer, what, tensor[head, block]))
            scales[head, block] = scale
            by_channel[head, :, block] = numbers.cpu().numpy().T
        words = scales.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return words.reshape(-1), pack(by_channel.reshape(-1), self.bits)

    def _levels(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales ``[n]`` and what is packed, ``[n, head_dim]`` (uint8), of ``[n, head_dim]`` in float32."""
        if self.bits == 1:
            return round_up(numbers.abs().mean(-1, dtype=torch.float64).float()), (numbers >= 0).to(torch.uint8)
        half = 2 ** (self.bits - 1)
        scale = round_up(numbers.abs().amax(-1) / (half - 1))
        levels = (numbers / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-half, half - 1)
        return scale, levels.to(torch.int8).view(torch.uint8).add_(half)

    def _restore(self, scales: Words, packed: Bytes, shape: Shape) -> torch.Tensor:
        """Numbers ``[kv_heads, kept, head_dim]`` in bfloat16."""
        heads, kept, dim = shape
        scale = bfloat16_of(scales).float().reshape(heads, kept, 1)
        by_channel = unpack(packed, self.bits, math.prod(shape)).reshape(heads, dim, kept)
        numbers = torch.from_numpy(by_channel.transpose(0, 2, 1).astype(np.float32, order="C"))
        centred = numbers.mul_(2).sub_(1) if self.bits == 1 else numbers.sub_(2 ** (self.bits - 1))
        return centred.mul_(scale).to(torch.bfloat16)
