"""Stock ``generate()`` on a smaller cache, for any Hugging Face model that kvferry can serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvferry.cache import KVCache
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.evidence import Prefilled
from kvferry.models.attention import Observer, Session, attached, current_session, session
from kvferry.models.kept import KeptLayer
from kvferry.models.layout import layout_of
from kvferry.models.prefill import layers_from
from kvferry.models.resume import kept_layers
from kvferry.models.rotary import rotary_of
from kvferry.models.support import check_supported, layer_windows


@dataclass
class Report:
    """What became of the last prompt's cache.

    Parameters
    ----------
    recipe : str
        In canonical form.
    prompt_tokens : int
    kept : tuple of int
        Tokens a head keeps, per layer; the mean, rounded down, where heads differ.
    kept_per_head : tuple of tuple of int
        Per layer and head.
    bytes_before, bytes_after : int
        Keys and values in memory, in the model's dtype.
    """

    recipe: str = ""
    prompt_tokens: int = 0
    kept: tuple[int, ...] = ()
    kept_per_head: tuple[tuple[int, ...], ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0


@contextmanager
def compressing(model: PreTrainedModel, recipe: Any, *, question_tokens: int | None = None) -> Iterator[Report]:
    """Let ``model.generate(**inputs)`` decode on a compressed cache.

    The prompt is read in full; then the cache's layers are replaced by smaller ones and the rest is freed. A codec
    other than ``bf16`` is applied by a round trip, so that its loss is real; memory is what the model's dtype takes.

    Parameters
    ----------
    recipe : str or Recipe
    question_tokens : int, optional
        How many tokens at the end of the prompt are the question. By default the text after the last visual token
        up to the generation prompt, or the last 32 tokens of a prompt without pictures.

    Yields
    ------
    Report
        Filled in when the prompt has been read.

    Raises
    ------
    UnsupportedModelError
        A family that cannot be served; several prompts, beams or sequences at once; padding; a static or quantized
        cache.
    """
    from kvferry.recipe import Recipe

    check_supported(model)
    if question_tokens is not None and question_tokens < 1:
        raise InputError(f"question_tokens must be at least 1, not {question_tokens}")
    work = _Work(model, Recipe.parse(recipe), question_tokens)
    hooks = (
        model.register_forward_pre_hook(work.before, with_kwargs=True),
        model.register_forward_hook(work.after, with_kwargs=True),
    )
    try:
        with attached(model), session(work.session):
            yield work.report
    finally:
        for hook in hooks:
            hook.remove()


class _Work:
    """The two hooks around every forward pass of the thread that entered :func:`compressing`."""

    def __init__(self, model: PreTrainedModel, recipe: Any, question_tokens: int | None) -> None:
        self.session = Session()
        self.report = Report(recipe=str(recipe))
        self._model = model
        self._recipe = recipe
        self._question_tokens = question_tokens
        self._layout: Any = None

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Serve kept layers, or get ready to watch a fresh prompt."""
        if current_session() is not self.session:
            return
        past = kwargs.get("past_key_values")
        self._layout = self.session.observer = self.session.kept = None
        if past is not None and past.layers and all(isinstance(x, KeptLayer) for x in past.layers):
            self.session.kept = past.layers
            return
        past = _fresh(past)
        inputs = {**kwargs, "input_ids": args[0]} if args else kwargs
        self._layout = layout_of(self._model, inputs, self._question_mask(inputs))
        layers = len(layer_windows(self._model))
        past.layers = [DynamicLayer() for _ in range(layers)]
        self.session.observer = Observer(self._recipe.requests, self._layout, layers, rotary_of(self._model))

    def after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a fresh prompt: select, round-trip the codec, and swap the layers."""
        if current_session() is not self.session:
            return
        self.session.kept = None
        if self._layout is None or self.session.observer is None:
            return
        length = len(self._layout)
        full = KVCache(layers_from(output.past_key_values, length), self._layout, length, fingerprint="")
        prefilled = Prefilled(full, self.session.observer.evidence(length), torch.empty(0))
        plain = self._recipe.codec.name == "bf16"
        kept = self._recipe.keep(prefilled) if plain else self._recipe.apply(prefilled)
        output.past_key_values.layers = kept_layers(self._model, kept)
        self._fill_report(full, kept, output.past_key_values.layers)
        self._layout = self.session.observer = None

    def _question_mask(self, inputs: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        if self._question_tokens is None or inputs.get("input_ids") is None:
            return None
        n = inputs["input_ids"].shape[-1]
        mask: np.ndarray[Any, np.dtype[np.bool_]] = np.arange(n) >= n - self._question_tokens
        return mask

    def _fill_report(self, full: KVCache, kept: KVCache, stored: list[KeptLayer]) -> None:
        self.report.prompt_tokens = full.length
        self.report.kept = kept.kept
        self.report.kept_per_head = tuple(layer.per_head for layer in kept)
        self.report.bytes_before = full.nbytes
        self.report.bytes_after = sum(x.keys.nbytes + x.values.nbytes for x in stored)


def _fresh(past: Any) -> DynamicCache:
    """``past`` itself, if it is an empty ordinary cache."""
    if past is None:
        raise UnsupportedModelError("there is no cache to compress; call generate() with use_cache=True")
    ordinary = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in past.layers)
    if not isinstance(past, DynamicCache) or past.offloading or not ordinary:
        raise UnsupportedModelError(
            f"a {type(past).__name__} cannot be compressed; leave cache_implementation at its default"
        )
    if past.get_seq_length():
        raise UnsupportedModelError("a cache that was filled elsewhere cannot be compressed; start a fresh generate()")
    return past
