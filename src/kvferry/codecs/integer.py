"""Per-token symmetric integers of 1 to 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

from kvferry.cache import PromptLayout
from kvferry.codecs.base import BF16_MAX, check_finite, check_size
from kvferry.codecs.packing import pack, packed_size, unpack
from kvferry.errors import InputError

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Integer:
    """One scale per token and head, ``s = max|t| / (2^(b-1) - 1)``, and ``q = round(t / s)``; ``b = 1`` keeps the sign
    and the mean magnitude.

    The quantizer of the sources (W.-L. Cheng and W. Liao, 2026; see also KIVI, arXiv 2402.02750, for why keys would
    rather be scaled per channel). ``|t - q s| <= s / 2`` for every number.

    The scale is a bfloat16, rounded *up*: it has the range of the input, so it can neither overflow nor underflow as
    a float16 would, and no number is clipped. Its coarser step widens ``s`` by under 0.8 %. Decodes in float32
    arithmetic to bfloat16.

    Bytes: scales of keys, scales of values, packed keys, packed values, each ``[kv_heads, kept]`` first.

    Parameters
    ----------
    bits : int
        1 to 8, really packed: 3-bit numbers take 3 bits.
    """

    bits: int

    word: ClassVar[int] = 1

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
        check_finite(layer, keys, values)
        (key_scales, key_bits), (value_scales, value_bits) = self._quantize(keys), self._quantize(values)
        return b"".join(x.tobytes() for x in (key_scales, value_scales, key_bits, value_bits))

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
        shapes = (key_shape, value_shape)
        scale_sizes = [2 * shape[0] * shape[1] for shape in shapes]
        value_sizes = [packed_size(math.prod(shape), self.bits) for shape in shapes]
        check_size(layer, payload, sum(scale_sizes) + sum(value_sizes))
        cuts = np.cumsum([0, *scale_sizes, *value_sizes])
        body = np.frombuffer(payload, np.uint8)
        key_scales, value_scales, keys, values = (body[a:b] for a, b in pairwise(cuts))
        return self._restore(key_scales, keys, key_shape), self._restore(value_scales, values, value_shape)

    def _quantize(self, tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Scales (bfloat16 bits as ``<i2``) and packed numbers of ``[heads, kept, dim]``."""
        tensor = tensor.float()
        if tensor.numel() == 0:
            scale = tensor.new_zeros(tensor.shape[:2])
            q = tensor
        elif self.bits == 1:
            scale = tensor.abs().mean(-1)
            q = tensor >= 0
        else:
            scale = tensor.abs().amax(-1) / (2 ** (self.bits - 1) - 1)
        scale = _round_up(scale)
        if self.bits > 1 and tensor.numel():
            top = 2 ** (self.bits - 1) - 1
            safe = torch.where(scale > 0, scale, 1.0)
            q = (tensor / safe[..., None]).round_().clamp_(-top - 1, top).add_(2 ** (self.bits - 1))
        packed = pack(q.to(torch.uint8).cpu().contiguous().numpy().reshape(-1), self.bits)
        bits = scale.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        return bits.astype("<i2", copy=False), packed

    def _restore(self, scales: np.ndarray, packed: np.ndarray, shape: Shape) -> torch.Tensor:
        """Numbers in bfloat16 from the two byte arrays."""
        scale = torch.from_numpy(scales.view("<i2").astype(np.int16)).view(torch.bfloat16).float()
        q = torch.from_numpy(unpack(packed, self.bits, math.prod(shape)).astype(np.float32))
        q = q * 2 - 1 if self.bits == 1 else q - 2 ** (self.bits - 1)
        return (q.reshape(shape) * scale.reshape(*shape[:2], 1)).to(torch.bfloat16)


def _round_up(scale: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 not below ``scale`` (non-negative float32), still as float32."""
    bits = scale.contiguous().view(torch.int32)
    up = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return up.clamp_(max=BF16_MAX)
