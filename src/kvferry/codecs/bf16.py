"""BF16: two bytes a number, nothing lost that bfloat16 holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvferry.codecs.base import Shape
from kvferry.codecs.checks import INFINITY, not_finite
from kvferry.codecs.packing import Bytes, join_words, split_words
from kvferry.codecs.side import Sided, What, bfloat16_of
from kvferry.lazy import torch


@dataclass(frozen=True)
class BF16(Sided):
    """Exact for bfloat16 caches; float32 and float16 are rounded to nearest. Decodes to bfloat16.

    Bytes: keys, then values; each as high bytes, then low bytes, ``[kv_heads, head_dim, kept]``.
    """

    name: ClassVar[str] = "bf16"

    def encode_side(self, layer: int, what: What, tensor: torch.Tensor, positions: torch.Tensor) -> bytes:
        """See :class:`~kvferry.codecs.side.Side`."""
        words = tensor.to(torch.bfloat16).cpu().contiguous().view(torch.int16)
        if words.numel() and int((words & 0x7FFF).max()) >= INFINITY:
            raise not_finite(layer, what)
        return split_words(words.numpy().view(np.uint16).transpose(0, 2, 1))

    def side_size(self, what: What, shape: Shape, positions: torch.Tensor) -> int:
        """Two bytes a number."""
        return 2 * math.prod(shape)

    def decode_side(self, what: What, octets: Bytes, shape: Shape, positions: torch.Tensor) -> torch.Tensor:
        """See :class:`~kvferry.codecs.side.Side`."""
        heads, kept, dim = shape
        words = join_words(octets).reshape(heads, dim, kept).transpose(0, 2, 1)
        return bfloat16_of(np.ascontiguousarray(words))
