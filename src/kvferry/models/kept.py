"""Kept tokens as the layers of a Transformers cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from kvferry.cache import LayerCache
from kvferry.errors import UnsupportedModelError


class KeptLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a pruned cache, as Transformers wants to see it.

    It reports the *logical* length, so that new tokens get their true position, and the *stored* length where masks
    are sized. Positions of what is stored are kept beside, per head.
    """

    is_croppable = False

    def __init__(self, layer: LayerCache, length: int, window: int | None, like: torch.Tensor) -> None:
        super().__init__()
        self.keys = layer.keys.to(like).unsqueeze(0)
        self.values = layer.values.to(like).unsqueeze(0)
        self.dtype, self.device = like.dtype, like.device
        self.is_initialized = True
        self.positions = layer.positions.to(like.device)
        self.length = length
        self.window = window

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens behind the logical end; returns all stored keys and values."""
        new = torch.arange(self.length, self.length + key_states.shape[-2], device=self.positions.device)
        self.positions = torch.cat([self.positions, new.expand(len(self.positions), -1)], dim=1)
        self.length += key_states.shape[-2]
        both: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return both

    def get_seq_length(self) -> int:
        """Tokens this layer stands for, dropped ones included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Stored length after ``query_length`` more tokens, and no offset."""
        return self.positions.shape[1] + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was dropped cannot come back."""
        raise UnsupportedModelError("a pruned cache cannot be rolled back; decode without an assistant model")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: there is one sequence."""
        raise UnsupportedModelError("a pruned cache holds one sequence; decode without beams")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: there is one sequence."""
        raise UnsupportedModelError("a pruned cache holds one sequence; ask for one answer at a time")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused: there is one sequence."""
        raise UnsupportedModelError("a pruned cache holds one sequence; ask for one answer at a time")

    def mask(self, query_length: int, query_heads: int) -> torch.Tensor | None:
        """Which stored key each of the newest ``query_length`` tokens may see.

        bool ``[1, 1 or query_heads, query_length, stored]``; None where all see all.
        """
        if query_length == 1 and self.window is None:
            return None
        shared = bool((self.positions == self.positions[:1]).all())
        return self._allowed(self.positions[:1] if shared else self.positions, query_length, query_heads)

    def _allowed(self, where: torch.Tensor, query_length: int, query_heads: int) -> torch.Tensor:
        """The mask for keys at the positions ``where`` (``[1 or kv_heads, stored]``)."""
        if len(where) > 1:
            where = where.repeat_interleave(query_heads // len(where), dim=0)
        mine = torch.arange(self.length - query_length, self.length, device=where.device)[:, None]
        allowed = where[:, None] <= mine
        if self.window is not None:
            allowed &= where[:, None] > mine - self.window
        return allowed.unsqueeze(0)


class RaggedLayer(KeptLayer):
    """One layer whose heads keep differently many tokens, stored end to end: ``keys`` is ``[1, 1, sum, head_dim]``.

    Attention gets all heads at once: a copy that is padded to the longest head and lives as long as this layer's
    attention does, so that between two layers only what was kept takes memory. The mask hides the padding.
    """

    def __init__(self, layer: LayerCache, length: int, window: int | None, like: torch.Tensor) -> None:
        super().__init__(layer, length, window, like)
        self.counts = layer.counts

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens to every head; returns padded keys and values, ``[1, kv_heads, longest, head_dim]``."""
        new = key_states.shape[-2]
        where = torch.arange(self.length, self.length + new, device=self.positions.device)
        self.positions = self._append(self.positions[0], where.expand(len(self.counts), -1))[None]
        self.keys = self._append(self.keys[0, 0], key_states[0])[None, None]
        self.values = self._append(self.values[0, 0], value_states[0])[None, None]
        self.counts = tuple(count + new for count in self.counts)
        self.length += new
        index, _ = self._padded()
        return self.keys[0, 0, index][None], self.values[0, 0, index][None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the longest head after ``query_length`` more tokens, and no offset."""
        return max(self.counts) + query_length, 0

    def mask(self, query_length: int, query_heads: int) -> torch.Tensor:
        """As for equal heads, but never None: nobody may see the padding."""
        index, real = self._padded()
        never = torch.iinfo(self.positions.dtype).max
        return self._allowed(self.positions[0, index].masked_fill(~real, never), query_length, query_heads)

    def _append(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """``stored`` ``[sum, ...]`` with ``new`` ``[kv_heads, q, ...]`` behind each head's own."""
        heads = zip(torch.split(stored, list(self.counts)), new, strict=True)
        return torch.cat([part for head in heads for part in head])

    def _padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each head's tokens are stored and which of these are not padding, ``[kv_heads, longest]`` both."""
        counts = torch.tensor(self.counts, device=self.positions.device)[:, None]
        place = torch.arange(max(self.counts), device=counts.device)
        real = place < counts
        return (counts.cumsum(0) - counts + place).where(real, 0), real
