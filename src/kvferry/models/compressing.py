"""Stock ``generate()`` on a smaller cache, for any Hugging Face model that kvferry can serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.evidence import Prefilled
from kvferry.models.attention import Observer, Session, attached, current_session, session
from kvferry.models.kept import KeptLayer
from kvferry.models.layout import layout_of, prompts_of
from kvferry.models.resume import kept_layers
from kvferry.models.rotary import rotary_of
from kvferry.models.support import check_supported, layer_windows

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class SequenceReport:
    """What became of one prompt.

    Parameters
    ----------
    prompt_tokens : int
        Without padding.
    kept : tuple of int
        Tokens a head keeps, per layer; the mean, rounded down, where heads differ.
    kept_per_head : tuple of tuple of int
        Per layer and head.
    """

    prompt_tokens: int = 0
    kept: tuple[int, ...] = ()
    kept_per_head: tuple[tuple[int, ...], ...] = ()


@dataclass
class Report:
    """What became of the cache of the prompts that were read last.

    For a single prompt, ``prompt_tokens``, ``kept`` and ``kept_per_head`` are at hand here too.

    Parameters
    ----------
    recipe : str
        In canonical form.
    sequences : tuple of SequenceReport
        One per sequence of the batch.
    bytes_before, bytes_after : int
        What the tensors of keys and values take in memory, in the model's dtype: of the whole batch, padding included.
    """

    recipe: str = ""
    sequences: tuple[SequenceReport, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def prompt_tokens(self) -> int:
        """See :class:`SequenceReport`."""
        return self._only.prompt_tokens

    @property
    def kept(self) -> tuple[int, ...]:
        """See :class:`SequenceReport`."""
        return self._only.kept

    @property
    def kept_per_head(self) -> tuple[tuple[int, ...], ...]:
        """See :class:`SequenceReport`."""
        return self._only.kept_per_head

    @property
    def _only(self) -> SequenceReport:
        if len(self.sequences) > 1:
            raise InputError(f"this report is of {len(self.sequences)} prompts; look at each in report.sequences")
        return self.sequences[0] if self.sequences else SequenceReport()


@contextmanager
def compressing(model: PreTrainedModel, recipe: Any, *, question_tokens: int | None = None) -> Iterator[Report]:
    """Let ``model.generate(**inputs)`` decode on a compressed cache, for one prompt or a batch padded on the left.

    The prompts are read in full; then the cache's layers are replaced by smaller ones and the rest is freed. Every
    sequence keeps what it would keep alone; per layer, the batch stores as many tokens as its longest sequence. A
    codec other than ``bf16`` is applied by a round trip, so that its loss is real; memory is what the model's dtype
    takes.

    For a further turn call ``generate()`` again with the longer ``input_ids`` and the ``past_key_values`` that the
    last turn returned, as with any Transformers cache: the new tokens are read on top of what was kept, and stay.

    Meanwhile the language model's attention is PyTorch's SDPA, whatever it was loaded with (eager, FlashAttention).

    Parameters
    ----------
    recipe : str or Recipe
    question_tokens : int, optional
        How many tokens at the end of each prompt are the question. By default the text after the last visual token
        up to the generation prompt, or the last 32 tokens of a prompt without pictures.

    Yields
    ------
    Report
        Filled in when the prompts have been read.

    Raises
    ------
    UnsupportedModelError
        A family that cannot be served; an assistant model; a static or quantized cache; a further turn with pictures
        whose tokens see each other in both directions.
    InputError
        Padding anywhere but on the left.
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

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Serve kept layers, or get ready to watch fresh prompts."""
        if current_session() is not self.session:
            return None
        past = kwargs.get("past_key_values")
        inputs = {**kwargs, "input_ids": args[0]} if args else kwargs
        self._forget()
        if past is not None and past.layers and all(isinstance(x, KeptLayer) for x in past.layers):
            self._serve(past, inputs)
            positions = _positions(past, inputs)
            return None if positions is None else (args, {**kwargs, "position_ids": positions})
        self._watch(_fresh(past), inputs)
        return None

    def after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After fresh prompts: select, round-trip the codec, and swap the layers."""
        if current_session() is not self.session:
            return
        observers = self.session.observers
        self._forget()
        if not observers:
            return
        past = output.past_key_values
        length, bytes_before = past.get_seq_length(), _storage(past.layers)
        kept = [self._compress(*pair) for pair in zip(_caches(past, observers), observers, strict=True)]
        past.layers = []
        past.layers = kept_layers(self._model, kept, length)
        past.rope_deltas = _rope_deltas([x.layout for x in kept])
        self.report.sequences = tuple(
            SequenceReport(x.length, x.kept, tuple(layer.per_head for layer in x)) for x in kept
        )
        self.report.bytes_before, self.report.bytes_after = bytes_before, _storage(past.layers)

    def _forget(self) -> None:
        self.session.observers, self.session.kept, self.session.seen = [], None, None

    def _serve(self, past: Any, inputs: dict[str, Any]) -> None:
        """Let new tokens see what was kept, but for padding."""
        ids, mask, kinds = (inputs.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
        if ids is None:
            raise InputError("new tokens on a compressed cache need input_ids; leave inputs_embeds out")
        n = ids.shape[1]
        if kinds is not None and bool(kinds[:, -n:].any()):
            raise UnsupportedModelError(
                "pictures whose tokens see each other cannot follow on a compressed cache; put all pictures in the "
                "first prompt, or start a fresh generate()"
            )
        if mask is not None and mask.shape != (len(ids), past.get_seq_length() + n):
            raise InputError(
                f"attention_mask {list(mask.shape)} must cover all {past.get_seq_length() + n} tokens so far of each "
                "sequence, those in the cache included"
            )
        self.session.kept = past.layers
        self.session.seen = None if mask is None else mask != 0

    def _watch(self, past: DynamicCache, inputs: dict[str, Any]) -> None:
        """Get ready to observe what the recipe needs, of each prompt for itself."""
        layouts = [layout_of(self._model, x, self._question_mask(x)) for x in prompts_of(self._model, inputs)]
        layers, rotary = len(layer_windows(self._model)), rotary_of(self._model)
        past.layers = [DynamicLayer() for _ in range(layers)]
        self.session.observers = [Observer(self._recipe.requests, layout, layers, rotary) for layout in layouts]

    def _question_mask(self, prompt: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        if self._question_tokens is None:
            return None
        n = prompt["input_ids"].shape[-1]
        mask: np.ndarray[Any, np.dtype[np.bool_]] = np.arange(n) >= n - self._question_tokens
        return mask

    def _compress(self, full: KVCache, observer: Observer) -> KVCache:
        prefilled = Prefilled(full, observer.evidence(full.length), torch.empty(0))
        plain = self._recipe.codec.name == "bf16"
        compressed: KVCache = self._recipe.keep(prefilled) if plain else self._recipe.apply(prefilled)
        return compressed


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


def _positions(past: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
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
