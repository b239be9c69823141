"""BF16: two bytes a number, nothing lost that bfloat16 holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kvferry.cache import PromptLayout
from kvferry.codecs.base import check_finite, check_size


@dataclass(frozen=True)
class BF16:
    """Keys, then values, ``[kv_heads, kept, head_dim]`` in little-endian bfloat16.

    Exact for bfloat16 caches; float32 and float16 are rounded to nearest. Decodes to bfloat16.
    """

    name: ClassVar[str] = "bf16"
    word: ClassVar[int] = 2

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Raises :class:`~kvferry.errors.InputError` on NaN, infinity, or what bfloat16 cannot hold."""
        check_finite(layer, keys, values)
        return b"".join(
            t.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
            for t in (keys, values)
        )

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: tuple[int, int, int],
        value_shape: tuple[int, int, int],
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in bfloat16."""
        split = 2 * int(np.prod(key_shape))
        check_size(layer, payload, split + 2 * int(np.prod(value_shape)))
        parts = ((payload[:split], key_shape), (payload[split:], value_shape))
        keys, values = (
            torch.from_numpy(np.frombuffer(part, "<i2").astype(np.int16)).view(torch.bfloat16).reshape(shape)
            for part, shape in parts
        )
        return keys, values
