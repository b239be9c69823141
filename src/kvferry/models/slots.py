"""Decoding many sequences at once, each on a compressed cache of its own; any may join or leave between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvferry.cache import LayerCache
from kvferry.models.attention import Session, session
from kvferry.models.cache_layers import NEVER
from kvferry.models.steady import KEYS, is_steady
from kvferry.models.support import kv_shapes, layer_windows

HIDDEN = float("-inf")


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of all sequences: a row of fixed capacity for each, whose heads keep how many tokens they like.

    ``keys``, ``values`` are ``[rows, kv_heads, capacity, d]``, in float32 where the model is steady, else in its dtype.
    What a query may see is a bias, ``[rows, kv_heads, capacity]``: 0 where a token is, minus infinity elsewhere.
    """

    is_croppable = False

    def __init__(
        self, rows: int, capacity: int, shape: tuple[int, int], window: int | None, wide: bool, like: torch.Tensor
    ) -> None:
        super().__init__()
        heads, d = shape
        new = like.new_zeros if not wide else like.float().new_zeros
        self.keys, self.values = new(rows, heads, capacity, d), new(rows, heads, capacity, d)
        self.bias = self.keys.new_full((rows, heads, capacity), HIDDEN)
        self.positions = torch.full((rows, heads, capacity), NEVER, device=like.device) if window else None
        self.window, self.active = window, 0
        self._wide = wide
        self._ends = torch.zeros(rows, heads, dtype=torch.long, device=like.device)
        self._starts = torch.arange(rows * heads, device=like.device).view(rows, heads) * capacity
        self._longest = [0] * rows
        self._now = torch.zeros(rows, 1, 1, dtype=torch.long, device=like.device)
        self.is_initialized, self.dtype, self.device = True, self.keys.dtype, like.device

    def put(self, row: int, layer: LayerCache) -> None:
        """Fill a row with what a sequence keeps."""
        for head, own in enumerate(layer.split() if layer.counts else [layer]):
            heads = slice(head, head + 1) if layer.counts else slice(None)
            kept = own.kept
            self.keys[row, heads, :kept] = own.keys.to(self.keys)
            self.values[row, heads, :kept] = own.values.to(self.values)
            self.bias[row, heads, :kept] = 0
            if self.positions is not None:
                self.positions[row, heads, :kept] = own.positions.to(self.positions.device)
            self._ends[row, heads] = self._starts[row, heads] + kept
            self._longest[row] = max(self._longest[row], kept)

    def take(self, row: int, before: LayerCache, length: int, dtype: torch.dtype) -> LayerCache:
        """What a row holds now that its sequence stands for ``length`` tokens; ``before`` is what was put there."""
        heads = []
        for head, old in enumerate(before.split()):
            count = int(self._ends[row, head] - self._starts[row, head])
            new = torch.arange(length - (count - old.kept), length, device=old.positions.device)
            keys, values = (x[row, head : head + 1, :count].to(dtype, copy=True) for x in (self.keys, self.values))
            heads.append(LayerCache(keys, values, torch.cat([old.positions, new[None]], dim=1)))
        return LayerCache.join(heads)

    def move(self, source: int, target: int) -> None:
        """Let the row ``source`` be ``target`` from now on; what was there is gone."""
        if source != target:
            count = max(self._longest[source], self._longest[target])
            for held in (self.keys, self.values, self.bias, self.positions):
                if held is not None:
                    held[target, :, :count] = held[source, :, :count]
            self._ends[target] = self._ends[source] - self._starts[source] + self._starts[target]
            self._longest[target] = self._longest[source]
        self.bias[source] = HIDDEN
        self._longest[source] = 0

    def begin(self, active: int, lengths: torch.Tensor) -> None:
        """A pass follows over the first ``active`` rows, whose new tokens stand at ``lengths`` (int64 ``[active]``)."""
        self.active = active
        if self.window is not None:
            self._now = lengths[:, None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one token to every active row; returns their keys and values up to the longest."""
        n = self.active
        at = self._ends[:n].flatten()
        d = key_states.shape[-1]
        self.keys.view(-1, d).index_copy_(0, at, key_states.reshape(-1, d).to(self.keys))
        self.values.view(-1, d).index_copy_(0, at, value_states.reshape(-1, d).to(self.values))
        self.bias.view(-1).index_fill_(0, at, 0.0)
        if self.positions is not None:
            now = self._now.expand(-1, self._ends.shape[1], -1)
            self.positions.view(-1).index_copy_(0, at, now.flatten())
        self._ends[:n] += 1
        for row in range(n):
            self._longest[row] += 1
        seen = self._seen()
        return self.keys[:n, :, :seen], self.values[:n, :, :seen]

    def mask(self, query_length: int, query_heads: int, seen: torch.Tensor | None = None) -> torch.Tensor:
        """What is added to the logits: ``[active, kv_heads (query_heads where not steady), 1, stored]``."""
        n, stored = self.active, self._seen()
        bias = self.bias[:n, :, :stored]
        if self.window is not None and self.positions is not None:
            bias = bias.masked_fill(self.positions[:n, :, :stored] <= self._now - self.window, HIDDEN)
        if not self._wide:
            bias = bias.repeat_interleave(query_heads // bias.shape[1], dim=1)
        return bias[:, :, None]

    def _seen(self) -> int:
        return min(-(-max(self._longest[: self.active]) // KEYS) * KEYS, self.keys.shape[2])

    def get_seq_length(self) -> int:
        """See Transformers; positions are given with every pass."""
        return max(self._longest)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See Transformers."""
        return self._seen() + query_length, 0


class Slots:
    """Rows for sequences of at most ``capacity`` tokens each, of which the first so many are in use.

    Parameters
    ----------
    model : PreTrainedModel
        With :func:`kvferry.models.attention.attach` applied.
    rows : int
        At least 1; 1 where the model turns keys by the length of a pass, which all rows share.
    capacity : int
        A multiple of 128.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        like = torch.empty(0, dtype=model.dtype, device=model.device)
        wide = is_steady(model)
        each = zip(kv_shapes(model), layer_windows(model), strict=True)
        self.rows, self.capacity, self.used = rows, capacity, 0
        self._model = model
        self._layers = [SlotLayer(rows, capacity, shape, window, wide, like) for shape, window in each]
        self._past = Cache(layers=self._layers)

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return self.rows - self.used

    def join(self, layers: Sequence[LayerCache]) -> int:
        """A row for what a sequence keeps."""
        row = self.used
        with torch.inference_mode():
            for slot, layer in zip(self._layers, layers, strict=True):
                slot.put(row, layer)
        self.used += 1
        return row

    def leave(self, row: int) -> int:
        """Free a row; the number of the row that takes its place, which is ``row`` where none does."""
        self.used -= 1
        with torch.inference_mode():
            for slot in self._layers:
                slot.move(self.used, row)
        return self.used

    def layers(self, row: int, before: Sequence[LayerCache], length: int) -> tuple[LayerCache, ...]:
        """What a row holds now, in the model's dtype: ``length`` tokens less those that ``before``, which it joined
        with, lacked."""
        with torch.inference_mode():
            each = zip(self._layers, before, strict=True)
            return tuple(slot.take(row, layer, length, self._model.dtype) for slot, layer in each)

    def step(self, tokens: Sequence[int], lengths: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
        """One token more for every row in use.

        Parameters
        ----------
        tokens, lengths
            What to feed, and how many tokens each sequence stands for before it.
        positions : int64 ``[axes, used]``
            Rotary positions of the new tokens.

        Returns
        -------
        float32 ``[used, vocabulary]``
        """
        device, n = self._model.device, self.used
        where = torch.tensor(lengths, device=device)
        for layer in self._layers:
            layer.begin(n, where)
        wide = positions[..., None].to(device)
        with torch.inference_mode(), session(Session(kept=self._layers)):
            output = self._model(
                input_ids=torch.tensor(tokens, device=device)[:, None],
                position_ids=wide[0] if len(wide) == 1 else wide,
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=1,
            )
        scores: torch.Tensor = output.logits[:, -1].float()
        return scores
