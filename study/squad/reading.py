"""One text read once for all of its questions, with evidence for every scorer, under both protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache

from kvferry.cache import KVCache, LayerCache, PromptLayout, Role
from kvferry.evidence import Evidence, EvidenceRequest, Prefilled
from kvferry.models import VLM
from kvferry.models.attention import Observer, Session, session
from kvferry.recipe import Recipe

TAIL = 32
"""Of a text, the last tokens are read anew for every question: the widest window of a scorer may reach there."""


def layout_of_ids(ids: Sequence[int], question: range) -> PromptLayout:
    """A prompt of text only whose question stands where it is said."""
    n = len(ids)
    role = np.full(n, Role.CONTEXT, np.uint8)
    role[question.start : question.stop] = Role.QUESTION
    return PromptLayout(
        np.array(ids, np.int32), np.zeros(n, np.uint8), role, np.arange(n, dtype=np.int32)[None], rope_delta=0
    )


def in_bf16(cache: KVCache) -> KVCache:
    """The cache as ``full|bf16`` carries it."""
    layers = [
        LayerCache(x.keys.bfloat16().to(x.keys), x.values.bfloat16().to(x.values), x.positions) for x in cache.layers
    ]
    return KVCache(tuple(layers), cache.layout, cache.length, cache.fingerprint, model_name=cache.model_name)


@dataclass
class Reader:
    """A text that was read up to :data:`TAIL` tokens before its end.

    Parameters
    ----------
    ids : sequence of int
        The text, with what stands before it.
    requests : tuple of EvidenceRequest
        Of every scorer.
    """

    vlm: VLM
    ids: Sequence[int]
    requests: tuple[EvidenceRequest, ...]
    _past: DynamicCache = field(init=False)
    _observer: Observer = field(init=False)

    def __post_init__(self) -> None:
        longest = [*self.ids, *[self.ids[-1]] * TAIL]
        layout = layout_of_ids(longest, range(len(self.ids), len(longest)))
        self._past = DynamicCache()
        self._observer = Observer(self.requests, layout, self.vlm.layers, self.vlm.rotary)
        self._pass(self.ids[:-TAIL], 0, self._observer)

    def read(self, then: Sequence[int], question: int, length: int) -> Prefilled:
        """The text with ``then`` behind it, the cache cut to ``length``.

        Parameters
        ----------
        question : int
            How many of the last tokens are the question; 0 for none, and only evidence that needs none.
        """
        ids = [*self.ids, *then]
        layout = layout_of_ids(ids, range(len(ids) - question, len(ids)))
        requests = [x for x in self.requests if question or x.rows not in ("question", "post_vision")]
        observer = self._observer.branch(layout, requests)
        start = len(self.ids) - TAIL
        logits = self._pass(ids[start:], start, observer)
        layers = []
        for layer in self._past.layers:
            keys, values = layer.keys[0, :, :length].clone(), layer.values[0, :, :length].clone()
            layers.append(LayerCache(keys, values, torch.arange(length).expand(len(keys), -1).contiguous()))
        self._past.crop(start - len(ids))
        held = layout if length < len(layout) else layout_of_ids(ids, range(0))
        cache = KVCache(tuple(layers), held, length, self.vlm.fingerprint, model_name=self.vlm.name)
        return Prefilled(cache, observer.evidence(length), logits)

    def _pass(self, ids: Sequence[int], start: int, observer: Observer) -> torch.Tensor:
        places = torch.arange(start, start + len(ids))[None]
        now = Session(observers=[observer], total=len(observer.layout))
        with torch.inference_mode(), session(now):
            output = self.vlm.model(
                input_ids=torch.tensor([list(ids)]),
                position_ids=places,
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[0, -1].float()
        return logits


def scene_of(prefilled: Prefilled, length: int) -> Prefilled:
    """What was read with a question, cut to the text before it: evidence that knows the question, an oracle."""
    cache = prefilled.cache
    layers = tuple(
        LayerCache(x.keys[:, :length].clone(), x.values[:, :length].clone(), x.positions[:, :length].contiguous())
        for x in cache.layers
    )
    cut = KVCache(layers, cache.layout.head(length), length, cache.fingerprint, model_name=cache.model_name)
    seen = prefilled.evidence.column_sums
    sums = {
        request: {i: x[:, :length] if request.statistic == "sum" else x for i, x in by_layer.items()}
        for request, by_layer in seen.items()
    }
    return Prefilled(cut, Evidence(sums), prefilled.next_logits)


def requests_of(recipes: Sequence[str]) -> tuple[EvidenceRequest, ...]:
    """What all recipes together want to be observed."""
    return tuple(dict.fromkeys(x for recipe in recipes for x in Recipe.parse(recipe).requests))
