"""Kept tokens as the layers of a Transformers cache, for one prompt or a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from kvferry.cache import LayerCache
from kvferry.errors import UnsupportedModelError
from kvferry.models.attention import current_session
from kvferry.models.blockwise import Rule

NEVER = 1 << 62
"""The position of a padding entry, which no token may see; ``pad`` takes it through a float, so a power of two."""


class KeptLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a pruned cache, as Transformers wants to see it: ``keys``, ``values`` ``[b, kv_heads, stored, d]``.

    It reports the *logical* length, so that new tokens get their true position, and the *stored* length where masks
    are sized. Sequences that keep fewer tokens than the longest of the batch are padded. Only a pass that kvferry
    serves may add tokens: Transformers' own masks are wrong for it.

    Parameters
    ----------
    layers : sequence of LayerCache
        What each of the ``b`` prompts keeps.
    starts : sequence of int
        How many padding tokens stand before each prompt. ``positions`` (``[b, kv_heads, stored]``) count them too, so
        that one number says where a new token of all sequences stands.
    length : int
        Of the padded prompts.
    window : int or None
        How far back a token sees, in a sliding layer.
    like : tensor
        Of the wanted dtype and device.
    """

    is_croppable = False
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    newest: torch.Tensor | None = None
    """The queries that were noted last, ``[b, query_heads, q, d]``; see :meth:`note`."""
    rule: Rule | None = None
    """How they attend."""
    _noted: int = -1

    def __init__(
        self, layers: Sequence[LayerCache], starts: Sequence[int], length: int, window: int | None, like: torch.Tensor
    ) -> None:
        super().__init__()
        self._store(layers, starts)
        self.keys, self.values = self.keys.to(like), self.values.to(like)
        self.positions = self.positions.to(like.device)
        self.dtype, self.device = like.dtype, like.device
        self.is_initialized = True
        self.length = length
        self.window = window

    def _store(self, layers: Sequence[LayerCache], starts: Sequence[int]) -> None:
        missing = [max(x.kept for x in layers) - x.kept for x in layers]
        self.padded = any(missing)
        each = list(zip(layers, missing, strict=True))
        self.keys = torch.stack([pad(x.keys, (0, 0, 0, rest)) for x, rest in each])
        self.values = torch.stack([pad(x.values, (0, 0, 0, rest)) for x, rest in each])
        where = [x.positions + start for x, start in zip(layers, starts, strict=True)]
        self.positions = torch.stack([pad(x, (0, rest), value=NEVER) for x, rest in zip(where, missing, strict=True)])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens behind the logical end; returns all stored keys and values.

        Raises
        ------
        UnsupportedModelError
            Outside a pass that serves this cache.
        """
        self._settle(key_states)
        new = torch.arange(self.length, self.length + key_states.shape[-2], device=self.positions.device)
        self.positions = torch.cat([self.positions, new.expand(*self.positions.shape[:2], -1)], dim=-1)
        self.length += key_states.shape[-2]
        both: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return both

    def _settle(self, new: torch.Tensor) -> None:
        """Make sure that this pass may be served, and lie where its layer computes (models may span devices)."""
        now = current_session()
        if now is None or now.kept is None or not any(x is self for x in now.kept):
            raise UnsupportedModelError(
                "a compressed cache goes on only inside kvferry.compressing(model, ...); open the block again for a "
                "further turn, and keep it open until generate() has returned"
            )
        if new.device != self.device:
            self.device = new.device
            self.keys, self.values, self.positions = (
                x.to(self.device) for x in (self.keys, self.values, self.positions)
            )

    def note(self, query: torch.Tensor, rule: Rule, most: int) -> None:
        """Remember the newest ``most`` queries, of which ``query`` (``[b, query_heads, q, d]``) are the last.

        Those from before a gap, in which passes noted nothing, are forgotten.
        """
        gap = self.newest is None or self._noted != self.length - query.shape[2]
        before = [] if gap or self.newest is None else [self.newest]
        self.newest = torch.cat([*before, query], dim=2)[:, :, -most:].clone()
        self.rule, self._noted = rule, self.length

    @property
    def longest(self) -> int:
        """Tokens that the longest head of the longest sequence holds."""
        return self.positions.shape[-1]

    def sequences(self) -> list[LayerCache]:
        """What each sequence holds, without what the batch is padded by."""
        real = (self.positions != NEVER)[:, 0]
        rows = zip(self.keys, self.values, self.positions, real, strict=True)
        return [LayerCache(k[:, some], v[:, some], p[:, some]) for k, v, p, some in rows]

    def put(self, layers: Sequence[LayerCache]) -> None:
        """Hold these instead, one per sequence, of what :meth:`sequences` gave."""
        self._store(layers, [0] * len(layers))

    def stored(self) -> LayerCache:
        """What this layer of one prompt holds now."""
        return LayerCache(self.keys[0], self.values[0], self.positions[0])

    def get_seq_length(self) -> int:
        """Tokens this layer stands for, dropped ones included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Stored length after ``query_length`` more tokens, and no offset."""
        return self.positions.shape[-1] + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was dropped cannot come back."""
        raise UnsupportedModelError("a pruned cache cannot be rolled back; decode without an assistant model")

    def reset(self) -> None:
        """Refused: a new prompt is read into a new cache."""
        raise UnsupportedModelError("a pruned cache cannot be emptied and used again; leave past_key_values out")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with other beams, see :meth:`batch_select_indices`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self.batch_select_indices(torch.arange(self._sequences()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with the sequences ``indices`` (int64 ``[new batch]``)."""
        indices = indices.to(self.positions.device)
        self.keys, self.values, self.positions = (x[indices] for x in (self.keys, self.values, self.positions))
        self._select_newest(indices)

    def _select_newest(self, indices: torch.Tensor) -> None:
        if self.newest is not None:
            self.newest = self.newest[indices.to(self.newest.device)]

    def _sequences(self) -> int:
        return len(self.keys)

    def mask(self, query_length: int, query_heads: int, seen: torch.Tensor | None = None) -> torch.Tensor | None:
        """Which stored key each of the newest ``query_length`` tokens may see.

        Parameters
        ----------
        seen : bool ``[b, length]``, optional
            Where false, all later tokens must not see the token (padding); by default there is none.

        Returns
        -------
        bool ``[b, 1 or query_heads, query_length, stored]``; None where all see all.
        """
        if query_length == 1 and self.window is None and seen is None and not self.padded:
            return None
        shared = bool((self.positions == self.positions[:, :1]).all())
        return self._allowed(self.positions[:, :1] if shared else self.positions, query_length, query_heads, seen)

    def _allowed(
        self, where: torch.Tensor, query_length: int, query_heads: int, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """The mask for keys at the positions ``where`` (``[b, 1 or kv_heads, stored]``)."""
        if where.shape[1] > 1:
            where = where.repeat_interleave(query_heads // where.shape[1], dim=1)
        mine = torch.arange(self.length - query_length, self.length, device=where.device)[:, None]
        allowed = where[:, :, None] <= mine
        if self.window is not None:
            allowed &= where[:, :, None] > mine - self.window
        if seen is not None:
            place = where.flatten(1).clamp(max=self.length - 1)
            allowed &= seen.to(where.device).gather(1, place).view_as(where)[:, :, None]
        return allowed


class RaggedLayer(KeptLayer):
    """One layer whose heads keep differently many tokens.

    All heads of all sequences are stored end to end: ``keys`` is ``[1, 1, sum, head_dim]``, ``positions`` ``[sum]``.
    Attention gets all heads at once: a copy that is padded to the longest head and lives as long as this layer's
    attention does, so that between two layers only what was kept takes memory. The mask hides the padding.
    """

    def _store(self, layers: Sequence[LayerCache], starts: Sequence[int]) -> None:
        heads = [head for layer in layers for head in layer.split()]
        self._heads = layers[0].heads
        self.counts = tuple(head.kept for head in heads)
        self.keys = torch.cat([head.keys[0] for head in heads])[None, None]
        self.values = torch.cat([head.values[0] for head in heads])[None, None]
        where = [layer.positions + start for layer, start in zip(layers, starts, strict=True)]
        self.positions = torch.cat([x.flatten() for x in where])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens to every head; returns padded keys and values, ``[b, kv_heads, longest, head_dim]``."""
        self._settle(key_states)
        new = key_states.shape[-2]
        where = torch.arange(self.length, self.length + new, device=self.positions.device)
        self.positions = self._append(self.positions, where.expand(len(self.counts), -1))
        self.keys = self._append(self.keys[0, 0], key_states.flatten(0, 1))[None, None]
        self.values = self._append(self.values[0, 0], value_states.flatten(0, 1))[None, None]
        self.counts = tuple(count + new for count in self.counts)
        self.length += new
        index, _ = self._padded()
        return self.keys[0, 0, index], self.values[0, 0, index]

    @property
    def longest(self) -> int:
        """Tokens that the longest head of the longest sequence holds."""
        return max(self.counts)

    def sequences(self) -> list[LayerCache]:
        """What each sequence holds."""
        parts = (self.keys[0, 0], self.values[0, 0], self.positions)
        heads = [
            LayerCache(k[None], v[None], p[None])
            for k, v, p in zip(*(torch.split(x, list(self.counts)) for x in parts), strict=True)
        ]
        return [LayerCache.join(heads[i : i + self._heads]) for i in range(0, len(heads), self._heads)]

    def stored(self) -> LayerCache:
        """What this layer of one prompt holds now."""
        return LayerCache(self.keys[0], self.values[0], self.positions[None], self.counts)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the longest head after ``query_length`` more tokens, and no offset."""
        return max(self.counts) + query_length, 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with the sequences ``indices`` (int64 ``[new batch]``)."""
        rows = [one * self._heads + head for one in indices.tolist() for head in range(self._heads)]
        self.keys, self.values = (self._pick(x[0, 0], rows)[None, None] for x in (self.keys, self.values))
        self.positions = self._pick(self.positions, rows)
        self.counts = tuple(self.counts[row] for row in rows)
        self._select_newest(indices)

    def mask(self, query_length: int, query_heads: int, seen: torch.Tensor | None = None) -> torch.Tensor:
        """As for equal heads, but never None: nobody may see the padding."""
        index, real = self._padded()
        return self._allowed(self.positions[index].masked_fill(~real, NEVER), query_length, query_heads, seen)

    def _sequences(self) -> int:
        return len(self.counts) // self._heads

    def _append(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """``stored`` ``[sum, ...]`` with ``new`` ``[b * kv_heads, q, ...]`` behind each head's own."""
        heads = zip(torch.split(stored, list(self.counts)), new, strict=True)
        return torch.cat([part for head in heads for part in head])

    def _pick(self, stored: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """The heads ``rows`` of ``stored`` ``[sum, ...]``, end to end."""
        heads = torch.split(stored, list(self.counts))
        return torch.cat([heads[row] for row in rows])

    def _padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each head's tokens are stored, and which of these are not padding: ``[b, kv_heads, longest]`` both."""
        counts = torch.tensor(self.counts, device=self.positions.device)[:, None]
        place = torch.arange(max(self.counts), device=counts.device)
        real = place < counts
        index = (counts.cumsum(0) - counts + place).where(real, 0)
        shape = (-1, self._heads, len(place))
        return index.view(shape), real.view(shape)
