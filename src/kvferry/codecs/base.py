"""Kept tokens <-> bytes, one layer at a time."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from kvferry.cache import PromptLayout


@runtime_checkable
class Codec(Protocol):
    """A codec is a frozen dataclass with these two methods.

    ``encode`` gets keys and values of one layer, ``[kv_heads, kept, head_dim]`` of any float dtype, with the
    prompt index of every entry (``[kv_heads, kept]``) and the layout; it returns self-contained bytes.
    ``decode`` gets those bytes and the shapes back and must refuse, by :class:`kvferry.errors.CorruptError`,
    a payload of the wrong size before it allocates anything.
    """

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes: ...

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: tuple[int, int, int],
        value_shape: tuple[int, int, int],
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
