"""Carry on from a cache: kept tokens as a Transformers cache, and a greedy loop on top."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import FingerprintError, InputError, UnsupportedModelError
from kvferry.models.attention import Session, attached, session
from kvferry.models.support import kv_shape, layer_windows


@dataclass(frozen=True)
class Continuation:
    """What a model said.

    Parameters
    ----------
    text : str
    token_ids : tuple of int
        Without the token that ended the answer.
    first_token_seconds : float
        From the call until the first token was known.
    seconds : float
        From the call until the end.
    """

    text: str
    token_ids: tuple[int, ...]
    first_token_seconds: float
    seconds: float


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
        where = self.positions
        if bool((where == where[:1]).all()):
            where = where[:1]
        else:
            where = where.repeat_interleave(query_heads // len(where), dim=0)
        mine = torch.arange(self.length - query_length, self.length, device=where.device)[:, None]
        allowed = where[:, None] <= mine
        if self.window is not None:
            allowed &= where[:, None] > mine - self.window
        return allowed.unsqueeze(0)


def kept_layers(model: PreTrainedModel, cache: KVCache) -> list[KeptLayer]:
    """The cache's layers on the model's device and in its dtype; ``cache`` itself is not touched."""
    windows = layer_windows(model)
    _check_fit(model, cache, len(windows))
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    return [KeptLayer(layer, cache.length, window, like) for layer, window in zip(cache, windows, strict=True)]


def _check_fit(model: PreTrainedModel, cache: KVCache, layers: int) -> None:
    """A cache may come from far away: shapes and token ids must be what this model can take."""
    shape = kv_shape(model)
    shapes = {(t.shape[0], t.shape[2]) for layer in cache for t in (layer.keys, layer.values)}
    if len(cache.layers) != layers or shapes != {shape}:
        raise FingerprintError(
            f"a cache of {len(cache.layers)} layers and (heads, channels) {sorted(shapes)} does not fit a model of "
            f"{layers} layers and {shape}; load the model that made it"
        )


def check_token_ids(model: PreTrainedModel, token_ids: Iterable[int]) -> None:
    """Refuse token ids outside the model's vocabulary: on a GPU they would end the process."""
    size = model.get_input_embeddings().num_embeddings
    for token in token_ids:
        if not 0 <= token < size:
            raise InputError(f"token id {token} is outside the model's vocabulary of {size}; use its own tokenizer")


class Decoder:
    """Feeds tokens on top of a cache, at their true positions and without any state in the model."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self._model = model
        self._layout = cache.layout
        self._kept = kept_layers(model, cache)
        self._past = Cache(layers=self._kept)
        self.length = cache.length

    def feed(self, token_ids: Sequence[int], logits: int = 1) -> torch.Tensor:
        """Logits after the last ``logits`` of the given tokens, float32 ``[logits, vocabulary]``."""
        check_token_ids(self._model, token_ids)
        device = self._model.device
        positions = positions_after(self._layout, self.length, len(token_ids)).to(device)
        with torch.inference_mode(), session(Session(kept=self._kept)):
            output = self._model(
                input_ids=torch.tensor([list(token_ids)], device=device),
                position_ids=positions[0][None] if len(positions) == 1 else positions[:, None],
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=logits,
            )
        self.length += len(token_ids)
        scores: torch.Tensor = output.logits[0].float()
        return scores


def positions_after(layout: PromptLayout, start: int, count: int) -> torch.Tensor:
    """Rotary positions of tokens ``start`` to ``start + count``, int64 ``[axes, count]``."""
    axes, n = layout.positions.shape
    written = layout.positions[:, start : start + count].astype(np.int64)
    beyond = np.arange(max(start, n), start + count) + layout.rope_delta
    return torch.from_numpy(np.concatenate([written, np.tile(beyond, (axes, 1))], axis=1))


def stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """The token ids that end an answer, from the model's generation configuration."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def continue_from(
    model: PreTrainedModel,
    cache: KVCache,
    token_ids: Sequence[int] | None = None,
    max_new_tokens: int = 16,
    *,
    stop: Collection[int] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Continuation:
    """Greedy decoding on top of a cache; the cache is not changed.

    Parameters
    ----------
    token_ids : sequence of int, optional
        Fed first; by default the prompt tokens that are not in the cache yet.
    max_new_tokens : int
        At least 1.
    stop : collection of int, optional
        Tokens that end the answer; by default the generation configuration's.
    on_token : callable, optional
        Called with every token as soon as it is known.

    Raises
    ------
    InputError
        Nothing to feed, or ``max_new_tokens`` below 1.
    """
    began = time.perf_counter()
    feed = cache.pending.tolist() if token_ids is None else [int(x) for x in token_ids]
    if not feed:
        raise InputError("this cache holds no question; pass one to get an answer")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    ends = stop_ids(model) if stop is None else stop
    said: list[int] = []
    first = 0.0
    with attached(model):
        decoder = Decoder(model, cache)
        for _ in range(max_new_tokens):
            token = int(decoder.feed(feed)[-1].argmax())
            first = first or time.perf_counter() - began
            if token in ends:
                break
            said.append(token)
            if on_token is not None:
                on_token(token)
            feed = [token]
    return Continuation("", tuple(said), first, time.perf_counter() - began)
