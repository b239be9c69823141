"""Per-token symmetric integers of 1 to 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from kvferry.cache import PromptLayout
from kvferry.codecs.base import Shape
from kvferry.codecs.checks import check_size
from kvferry.codecs.entropy import Decoder, Encoder
from kvferry.codecs.levels import by_channel, quantize, quantize_packed, restore, restore_packed
from kvferry.codecs.packing import Bytes, Words, join_words, pack, packed_size, split_words, unpack
from kvferry.codecs.side import What
from kvferry.errors import InputError
from kvferry.lazy import torch


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
    values (``[kv_heads, head_dim, kept]``, ``q + 2^(b-1)``); :class:`ByToken` where no lossless stage follows. With
    ``coder=range`` the same numbers as one range-coded stream, each channel by a model that adapts from token to token,
    wherever that is shorter: a payload as long as the packed one is the packed one.

    Parameters
    ----------
    bits : int
        1 to 8, really packed: 3-bit numbers take 3 bits.
    coder : {"packed", "range"}
        ``range`` takes the place of ``| zstd``. On validation caches of the testbed's cloud, 2, 3, 4, 6 and 8 bits take
        81, 75, 85, 85 and 97 % of what zstd (level 3) makes of them; where ``leaveout@0.05`` keeps 10 tokens, 74, 81,
        94, 100 and 100 %. One thread of an AMD EPYC writes and reads 22 million numbers a second at 3 bits with numba,
        7 million without, and a million without constriction, too.
    """

    bits: int
    coder: Literal["packed", "range"] = "packed"

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
        sides: tuple[tuple[What, torch.Tensor], ...] = ("keys", keys), ("values", values)
        (a, x), (b, y) = (self._pack(layer, what, tensor) for what, tensor in sides)
        pieces = split_words(np.concatenate([a.reshape(-1), b.reshape(-1)])), x.data, y.data
        if self.coder == "packed" or not keys.numel() or keys.shape[:2] != values.shape[:2]:
            return b"".join(pieces)
        encoder = Encoder()
        encoder.words(np.concatenate([a, b]))
        channels = [by_channel(quantize(layer, what, tensor, self.bits)[1]) for what, tensor in sides]
        encoder.adaptive(np.concatenate([x.reshape(-1, x.shape[2]) for x in channels]), 1 << self.bits)
        coded = encoder.finish()
        return coded if len(coded) < sum(map(len, pieces)) else b"".join(pieces)

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
        shapes = key_shape, value_shape
        heads, kept, _ = key_shape
        split = heads * kept
        sizes = [2 * (split + value_shape[0] * value_shape[1])]
        sizes += [packed_size(math.prod(shape), self.bits) for shape in shapes]
        if self.coder == "range" and len(payload) < sum(sizes) and key_shape[:2] == value_shape[:2]:
            decoder = Decoder(payload)
            words = decoder.words(2 * heads, kept).reshape(-1)
            rows = [heads * shape[2] for shape in shapes]
            channels = decoder.adaptive(sum(rows), kept, 1 << self.bits).astype(np.uint8, order="C")
            decoder.finish()
            turned = (by_channel(x.reshape(heads, -1, kept)) for x in np.split(channels, rows[:1]))
            keys, values = (
                restore(scales, levels, self.bits, shape)
                for scales, levels, shape in zip(np.split(words, [split]), turned, shapes, strict=True)
            )
            return keys, values
        check_size(layer, payload, sum(sizes))
        octets = np.frombuffer(payload, np.uint8)
        scales, x, y = (octets[a:b] for a, b in pairwise(np.cumsum([0, *sizes])))
        words = join_words(scales)
        return self._unpack(words[:split], x, key_shape), self._unpack(words[split:], y, value_shape)

    def encode_side(self, layer: int, what: What, tensor: torch.Tensor, positions: torch.Tensor) -> bytes:
        """Scales, then packed numbers; see :class:`~kvferry.codecs.side.Side`."""
        scales, packed = self._pack(layer, what, tensor)
        return b"".join([split_words(scales.reshape(-1)), packed.data])

    def side_size(self, what: What, shape: Shape, positions: torch.Tensor) -> int:
        """Two bytes a scale, and the packed numbers."""
        return 2 * shape[0] * shape[1] + packed_size(math.prod(shape), self.bits)

    def decode_side(self, what: What, octets: Bytes, shape: Shape, positions: torch.Tensor) -> torch.Tensor:
        """See :class:`~kvferry.codecs.side.Side`."""
        split = 2 * shape[0] * shape[1]
        return self._unpack(join_words(octets[:split]), octets[split:], shape)

    def for_stage(self, lossless: bool) -> Integer:
        """What encodes and decodes where a lossless stage follows, or none."""
        return (Integer if lossless else ByToken)(self.bits, self.coder)

    def _pack(self, layer: int, what: What, tensor: torch.Tensor) -> tuple[Words, Bytes]:
        """Scales ``[heads, n]`` and packed numbers."""
        words, levels = quantize(layer, what, tensor, self.bits)
        return words, pack(by_channel(levels).reshape(-1), self.bits)

    def _unpack(self, words: Words, packed: Bytes, shape: Shape) -> torch.Tensor:
        heads, n, dim = shape
        channels = unpack(packed, self.bits, math.prod(shape)).reshape(heads, dim, n)
        return restore(words, by_channel(channels), self.bits, shape)


@dataclass(frozen=True)
class ByToken(Integer):
    """:class:`Integer` with packed numbers in the order of the cache, ``[kv_heads, kept, head_dim]``: as many bytes.

    To transpose takes longer than all the rest, and serves nothing but a lossless stage. A recipe does not name this
    class: it is what ``int4`` stands for where no such stage follows.
    """

    def _pack(self, layer: int, what: What, tensor: torch.Tensor) -> tuple[Words, Bytes]:
        return quantize_packed(layer, what, tensor, self.bits)

    def _unpack(self, words: Words, packed: Bytes, shape: Shape) -> torch.Tensor:
        return restore_packed(words, packed, self.bits, shape)
