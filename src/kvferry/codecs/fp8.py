"""FP8: eight-bit floating point with one scale per token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from kvferry.codecs.base import Shape
from kvferry.codecs.packing import Bytes
from kvferry.codecs.side import Sided, What, finite, from_words, round_up, to_words
from kvferry.lazy import torch

_FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
"""What PyTorch calls them."""


@dataclass(frozen=True)
class FP8(Sided):
    """``t / s`` rounded to the nearest FP8 number, with ``s = max|t| / (largest FP8 number)`` per token and head.

    The formats are those of P. Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433). The error is
    at most ``|t| / 16`` (e4m3; ``|t| / 8`` with e5m2), or half of the format's smallest step times ``s`` near zero.
    Decodes to bfloat16. The scale is a bfloat16 rounded up, as in :class:`~kvferry.codecs.integer.Integer`.

    Bytes of keys, then of values: scales (``[kv_heads, kept]``; high bytes, then low bytes), numbers
    (``[kv_heads, head_dim, kept]``).

    Parameters
    ----------
    format : {"e4m3", "e5m2"}
        Three bits of mantissa and numbers to 448 (finite only), or two bits and numbers to 57344.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"
    name: ClassVar[str] = "fp8"

    @property
    def _dtype(self) -> torch.dtype:
        kind: torch.dtype = getattr(torch, _FORMATS[self.format])
        return kind

    def encode_side(self, layer: int, what: What, tensor: torch.Tensor, positions: torch.Tensor) -> bytes:
        """See :class:`~kvferry.codecs.side.Side`."""
        numbers = finite(layer, what, tensor)
        scale = round_up(numbers.abs().amax(-1) / torch.finfo(self._dtype).max)
        ratio = numbers / torch.where(scale > 0, scale, 1.0)[..., None]
        octets = ratio.to(self._dtype).view(torch.uint8).cpu().numpy()
        return to_words(scale) + np.ascontiguousarray(octets.transpose(0, 2, 1)).tobytes()

    def side_size(self, what: What, shape: Shape, positions: torch.Tensor) -> int:
        """One byte a number and two a scale."""
        return 2 * shape[0] * shape[1] + math.prod(shape)

    def decode_side(self, what: What, octets: Bytes, shape: Shape, positions: torch.Tensor) -> torch.Tensor:
        """See :class:`~kvferry.codecs.side.Side`."""
        heads, kept, dim = shape
        split = 2 * heads * kept
        scale = from_words(octets[:split]).reshape(heads, kept, 1)
        by_token = np.array(octets[split:].reshape(heads, dim, kept).transpose(0, 2, 1), order="C")
        return torch.from_numpy(by_token).view(self._dtype).float().mul_(scale).to(torch.bfloat16)
