"""BF16: two bytes a number, nothing lost that bfloat16 holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kvferry.cache import PromptLayout
from kvferry.codecs.base import Shape, check_size, not_finite
from kvferry.codecs.packing import join_words, split_words

_INFINITY = 0x7F80


@dataclass(frozen=True)
class BF16:
    """Exact for bfloat16 caches; float32 and float16 are rounded to nearest. Decodes to bfloat16.

    Bytes: keys, then values; each as high bytes, then low bytes, ``[kv_heads, head_dim, kept]``.
    """

    name: ClassVar[str] = "bf16"

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Raises :class:`~kvferry.errors.InputError` on NaN, infinity, or what bfloat16 cannot hold."""
        parts = []
        for what, tensor in (("keys", keys), ("values", values)):
            words = tensor.to(torch.bfloat16).cpu().contiguous().view(torch.int16)
            if words.numel() and int((words & 0x7FFF).max()) >= _INFINITY:
                raise not_finite(layer, what)
            parts.append(split_words(words.numpy().view(np.uint16).transpose(0, 2, 1)))
        return b"".join(parts)

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
        split = 2 * math.prod(key_shape)
        check_size(layer, payload, split + 2 * math.prod(value_shape))
        octets = np.frombuffer(payload, np.uint8)
        return _restore(octets[:split], key_shape), _restore(octets[split:], value_shape)


def _restore(octets: np.ndarray, shape: Shape) -> torch.Tensor:
    heads, kept, dim = shape
    words = join_words(octets).reshape(heads, dim, kept).transpose(0, 2, 1)
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int16)).view(torch.bfloat16)
