"""One forward pass inside :func:`kvferry.models.compressing.compressing`: prompts are read, or a kept cache goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.evidence import Prefilled
from kvferry.models.attention import Observer, Session, session
from kvferry.models.cache_layers import KeptLayer
from kvferry.models.decoding import Decoding, TailObserver, hand_over
from kvferry.models.layout import layout_of, prompts_of
from kvferry.models.reports import Report, SequenceReport
from kvferry.models.resume import kept_layers
from kvferry.models.rotary import check_same_turn, frequencies_at, rotary_of
from kvferry.models.support import layer_windows
from kvferry.models.ways import check_pass

Inputs = dict[str, Any]


@dataclass(frozen=True)
class _Reading:
    """Prompts that are read in several passes over one cache, ``total`` tokens with their padding."""

    past: DynamicCache
    observers: Sequence[Observer]
    total: int


_reading: ContextVar[_Reading | None] = ContextVar("kvferry_reading", default=None)


class Passes:
    """Serves the forward passes of one model by one recipe, from any thread; fills in ``report``."""

    def __init__(
        self, model: PreTrainedModel, recipe: Any, question_tokens: int | None, decoding: Decoding | None = None
    ) -> None:
        self.report = Report(recipe=str(recipe))
        self.served = 0
        """Passes that were compressed, or that went on from a compressed cache."""
        self._model = model
        self._recipe = recipe
        self._question_tokens = question_tokens
        self._decoding = decoding
        self._lock = Lock()

    def run(self, forward: Callable[..., Any], inputs: Inputs) -> Any:
        """``forward(**inputs)``, on a kept cache or followed by a selection from a fresh one."""
        check_pass(self._model, inputs)
        past, reading = inputs.get("past_key_values"), _reading.get()
        if reading is not None and past is reading.past:
            with session(Session(observers=reading.observers, total=reading.total)):
                return forward(**inputs)
        if is_kept(past):
            with self._serving(past, inputs):
                positions = _positions(past, inputs)
                output = forward(**inputs if positions is None else {**inputs, "position_ids": positions})
            self._bound(past)
            self.served += 1
            return output
        past = DynamicCache() if past is None else past
        observers = self._observers(past, inputs)
        with session(Session(observers=observers)):
            output = forward(**{**inputs, "past_key_values": past})
        self._swap(past, observers)
        return output

    @contextmanager
    def reading(self, past: Any, inputs: Inputs, step: int) -> Iterator[None]:
        """The passes meanwhile read the prompts of ``inputs`` into ``past``, ``step`` tokens at a time."""
        observers = self._observers(past, inputs)
        reach = max(x.layout.next_position for x in observers)
        if frequencies_at(self._model, step) != frequencies_at(self._model, reach):
            raise UnsupportedModelError(
                f"{self._model.config.model_type} turns the keys of a prompt of {reach:,} tokens otherwise than those "
                f"of its first {step:,}, so it cannot be read in parts; leave prefill_chunk_size out"
            )
        token = _reading.set(_Reading(past, observers, inputs["input_ids"].shape[1]))
        try:
            yield
        finally:
            _reading.reset(token)
        self._swap(past, observers)

    @contextmanager
    def _serving(self, past: Any, inputs: Inputs) -> Iterator[None]:
        """Let new tokens see what was kept, but for padding."""
        ids, mask, kinds = (inputs.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
        if ids is None:
            raise InputError("new tokens on a compressed cache need input_ids; leave inputs_embeds out")
        length, n = past.get_seq_length(), ids.shape[1]
        if kinds is not None and bool(kinds[:, -n:].any()):
            raise UnsupportedModelError(
                "pictures whose tokens see each other cannot follow on a compressed cache; put all pictures in the "
                "first prompt, or start a fresh generate()"
            )
        if mask is not None and mask.shape != (len(ids), length + n):
            raise InputError(
                f"attention_mask {list(mask.shape)} must cover all {length + n} tokens so far of each sequence, those "
                "in the cache included"
            )
        seen = None if mask is None else mask != 0
        if seen is None:
            check_same_turn(self._model, length, length + n)
        else:
            check_same_turn(self._model, int(seen[:, :length].sum(1).max()), int(seen.sum(1).max()))
        if self._decoding is not None and seen is not None and not bool(seen[:, past.begun :].all()):
            raise UnsupportedModelError(
                "padding behind a prompt does not go with decoding=, which would rank it too; answer the sequences of "
                "this turn one by one, or leave decoding= out"
            )
        tail = 0 if self._decoding is None else self._decoding.every
        with session(Session(kept=past.layers, seen=seen, tail=tail)):
            yield

    def _bound(self, past: Any) -> None:
        """Hold the layers of a kept cache under the bound, where there is one."""
        if self._decoding is not None:
            cut = [self._decoding.cut(layer) for layer in past.layers]
            with self._lock:
                self.report.selections += any(cut)
                self.report.longest = max(self.report.longest, *(layer.longest for layer in past.layers))

    def _observers(self, past: Any, inputs: Inputs) -> list[Observer]:
        """Get ready to observe what the recipe needs, of each prompt for itself, while ``past`` is filled."""
        _check_fresh(past)
        layouts = [layout_of(self._model, x, self._question_mask(x)) for x in prompts_of(self._model, inputs)]
        if len({frequencies_at(self._model, x.next_position) for x in layouts}) > 1:
            raise UnsupportedModelError(
                f"{self._model.config.model_type} turns the keys of prompts as long as these by different frequencies, "
                "but those of one batch alike; call generate() for each of them"
            )
        layers, rotary = len(layer_windows(self._model)), rotary_of(self._model)
        past.layers = [DynamicLayer() for _ in range(layers)]
        make = Observer if self._decoding is None else partial(TailObserver, self._decoding.every)
        return [make(self._recipe.requests, layout, layers, rotary) for layout in layouts]

    def _question_mask(self, prompt: Inputs) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        if self._question_tokens is None:
            return None
        n = prompt["input_ids"].shape[-1]
        mask: np.ndarray[Any, np.dtype[np.bool_]] = np.arange(n) >= n - self._question_tokens
        return mask

    def _swap(self, past: Any, observers: Sequence[Observer]) -> None:
        """After fresh prompts: select, round-trip the codec, and swap the layers."""
        length, bytes_before = past.get_seq_length(), _storage(past.layers)
        like = [x.keys.new_empty(0) for x in past.layers]
        kept = [self._compress(*pair) for pair in zip(_caches(past, observers), observers, strict=True)]
        past.layers = []
        past.layers = kept_layers(self._model, kept, length, like)
        past.rope_deltas = _rope_deltas([x.layout for x in kept])
        sequences = tuple(SequenceReport(x.length, x.kept, tuple(layer.per_head for layer in x)) for x in kept)
        with self._lock:
            self.served += 1
            self.report.sequences = sequences
            self.report.bytes_before, self.report.bytes_after = bytes_before, _storage(past.layers)
            self.report.selections = self.report.longest = 0
        past.begun = length
        if self._decoding is not None:
            hand_over(observers, past.layers)
            self._bound(past)

    def _compress(self, full: KVCache, observer: Observer) -> KVCache:
        prefilled = Prefilled(full, observer.evidence(full.length), torch.empty(0))
        plain = self._recipe.codec.name == "bf16"
        compressed: KVCache = self._recipe.keep(prefilled) if plain else self._recipe.apply(prefilled)
        return compressed


def is_kept(past: Any) -> bool:
    """Whether a cache was compressed by :class:`Passes`."""
    layers = getattr(past, "layers", [])
    return bool(layers) and all(isinstance(x, KeptLayer) for x in layers)


def _caches(past: Any, observers: Sequence[Observer]) -> list[KVCache]:
    """The full cache of each prompt, without its padding; they share the memory of ``past``."""
    caches = []
    for row, layout in enumerate(x.layout for x in observers):
        layers = [_row(layer, row, len(layout)) for layer in past.layers]
        caches.append(KVCache(tuple(layers), layout, len(layout), fingerprint=""))
    return caches


def _row(layer: Any, row: int, length: int) -> LayerCache:
    """The last ``length`` tokens of one sequence of a Transformers cache layer that kept everything."""
    keys, values = layer.keys[row, :, -length:], layer.values[row, :, -length:]
    positions = torch.arange(length, device=keys.device).expand(len(keys), -1).contiguous()
    return LayerCache(keys, values, positions)


def _rope_deltas(layouts: Sequence[PromptLayout]) -> torch.Tensor | None:
    """M-RoPE's offsets of what follows each prompt, int64 ``[b, 1]``, as ``get_rope_index`` gives them; else None.

    Transformers' models remember those of the batch they read last; a kept cache may go on after another.
    """
    if len(layouts[0].positions) == 1:
        return None
    return torch.tensor([[int(x.positions.max()) + 1 - len(x)] for x in layouts])


def _positions(past: Any, inputs: Inputs) -> torch.Tensor | None:
    """M-RoPE positions ``[3, b, q]`` of ``q`` new tokens on a kept cache; None where those given are right.

    Transformers adds the offset that the model remembers from the batch it read last. That shows in a leading axis
    of 1, or is yet to come where no positions are given. Here it is the offset of this very batch.
    """
    given, deltas = inputs.get("position_ids"), getattr(past, "rope_deltas", None)
    if deltas is None or (given is not None and (given.ndim != 3 or len(given) != 1)):
        return None
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    length = past.get_seq_length() + ids.shape[1]
    places: torch.Tensor = torch.arange(length, device=ids.device).expand(len(ids), -1)
    if mask is not None:
        places = mask.long().cumsum(-1) - 1
    new: torch.Tensor = places[:, -ids.shape[1] :] + deltas.to(ids.device)
    return new.expand(3, -1, -1)


def _storage(layers: Sequence[Any]) -> int:
    """Bytes of memory behind the keys and values of a cache's layers."""
    return sum(x.untyped_storage().nbytes() for layer in layers for x in (layer.keys, layer.values))


def _check_fresh(past: Any) -> None:
    """``past`` must be an empty ordinary cache."""
    ordinary = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in getattr(past, "layers", [None]))
    if not isinstance(past, DynamicCache) or past.offloading or not ordinary:
        raise UnsupportedModelError(
            f"a {type(past).__name__} cannot be compressed; leave cache_implementation at its default"
        )
    if past.get_seq_length():
        raise UnsupportedModelError("a cache that was filled elsewhere cannot be compressed; start a fresh generate()")
