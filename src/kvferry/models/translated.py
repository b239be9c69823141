"""Text on top of visual tokens whose keys and values came from elsewhere: another model's cache, translated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.models.attention import attached
from kvferry.models.prefill import read_prompt
from kvferry.models.resume import Decoder, check_token_ids
from kvferry.models.rotary import moves
from kvferry.models.steps import Pace, Steps, fed
from kvferry.models.support import tied_heads
from kvferry.models.vlm import VLM

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys, turned to their positions, and values of every layer, ``[heads, k, channels]``."""
HIDDEN = -1e9
"""Added to the logit of what a token may not see; finite, so that gradients are."""


def read_on(
    vlm: VLM, layout: PromptLayout, length: int, pairs: Pairs, index: torch.Tensor, pace: Pace
) -> Steps[KVCache]:
    """A prompt's cache: visual tokens as they are given, text read by the model on top of those before it.

    Visual tokens that are not among ``index`` are absent, as after an eviction.

    Parameters
    ----------
    layout : PromptLayout
        Of the whole prompt, which holds text before its first picture.
    length : int
        Of the cache, see :class:`kvferry.cache.KVCache`.
    index : int64 ``[k]``
        Where the given visual tokens stand in the prompt, ascending.
    """
    model = vlm.model
    check_token_ids(model, layout.token_ids.tolist())
    like = [(k.to(model.device, model.dtype), v.to(model.device, model.dtype)) for k, v in pairs]
    cache: KVCache | None = None
    for first, stop, visual in stretches(layout.visual[:length]):
        if cache is None:
            if visual:
                raise InputError("a translated prompt begins with text, which its template writes; send mode image")
            cache = _first(vlm, layout, stop)
            yield
        elif visual:
            some = torch.nonzero((index >= first) & (index < stop))[:, 0]
            layers = [_with(x, k[:, some], v[:, some], index[some]) for x, (k, v) in zip(cache, like, strict=True)]
            cache = replace(cache, layers=tuple(layers), length=stop)
        else:
            with attached(model):
                decoder = Decoder(model, cache)
                yield from fed(decoder, layout.token_ids[first:stop].tolist(), pace)
                cache = replace(cache, layers=decoder.layers, length=stop)
    assert cache is not None  # a prompt has at least one token
    return cache


def stretches(visual: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int, bool]]:
    """First token, the one behind the last, and whether it is of a picture, for every stretch of equal kind."""
    ends = [*(np.flatnonzero(np.diff(visual)) + 1).tolist(), len(visual)]
    first = 0
    for stop in ends:
        yield first, stop, bool(visual[first])
        first = stop


def _first(vlm: VLM, layout: PromptLayout, stop: int) -> KVCache:
    """The cache of the text before the first picture, with the layout of the whole prompt."""
    model = vlm.model
    ids = torch.from_numpy(layout.token_ids[:stop].astype(np.int64))[None]
    head = layout if stop == len(layout) else layout.head(stop)
    cache = read_prompt(model, {"input_ids": ids}, head, (), length=stop, fingerprint=vlm.fingerprint).cache
    return replace(cache, layout=layout, tied_heads=tied_heads(model))


def _with(layer: LayerCache, keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> LayerCache:
    """``layer`` and the tokens ``index`` behind its own."""
    where = index.to(layer.positions.device).expand(layer.heads, -1)
    both = torch.cat([layer.keys, keys], 1), torch.cat([layer.values, values], 1)
    return LayerCache(*both, torch.cat([layer.positions, where], 1))


@dataclass(frozen=True)
class Asking:
    """One question on a scene, and an answer that is fed behind it.

    Parameters
    ----------
    layout : PromptLayout
    answer : tuple of int
        Token ids.
    """

    layout: PromptLayout
    answer: tuple[int, ...]


class _Given(DynamicLayer):  # type: ignore[misc]
    """Keys and values that are there before a pass, ``[b, heads, k, channels]``; gradients go through."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device


def answer_logits(
    model: PreTrainedModel, pairs: Pairs, index: torch.Tensor, asked: Sequence[Asking]
) -> list[torch.Tensor]:
    """Logits for every answer token and for what follows, float32 ``[tokens + 1, vocabulary]`` for each of ``asked``.

    One pass over the text of all questions of one scene, with gradients with respect to ``pairs``.

    Parameters
    ----------
    index : int64 ``[k]``
        Where the visual tokens stand, in each of the prompts.

    Raises
    ------
    UnsupportedModelError
        The model's frequencies follow from a pass's length.
    """
    if moves(model):
        raise UnsupportedModelError(
            f"{model.config.model_type} turns keys by the length of a pass, so that nothing can be learned for it; "
            "take another model as the large one"
        )
    device, count = model.device, len(asked)
    texts = [_text(one) for one in asked]
    longest = max(len(ids) for ids, _, _ in texts)
    ids = torch.zeros(count, longest, dtype=torch.long)
    positions = torch.zeros(len(asked[0].layout.positions), count, longest, dtype=torch.long)
    where = torch.full((count, longest), 1 << 40)
    for row, (mine, places, order) in enumerate(texts):
        ids[row, : len(mine)], positions[:, row, : len(mine)], where[row, : len(mine)] = mine, places, order
    sees = torch.cat([index.expand(count, -1), where], 1)[:, None] <= where[:, :, None]
    sees[:, :, len(index) :] &= torch.ones(longest, longest, dtype=torch.bool).tril()
    past = [_Given(*(x.to(model.dtype).expand(count, -1, -1, -1) for x in pair)) for pair in pairs]
    mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, HIDDEN)[:, None]
    logits = model(
        input_ids=ids.to(device),
        position_ids=positions[0].to(device) if len(positions) == 1 else positions.to(device),
        past_key_values=Cache(layers=past),
        attention_mask=mask.to(device),
        use_cache=True,
    ).logits
    ends = [len(mine) for mine, _, _ in texts]
    return [
        logits[row, end - len(one.answer) - 1 : end].float()
        for row, (one, end) in enumerate(zip(asked, ends, strict=True))
    ]


def _text(one: Asking) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids ``[t]``, rotary positions ``[axes, t]`` and places in the prompt ``[t]`` of the text and the answer."""
    layout, said = one.layout, np.asarray(one.answer, np.int64)
    text = np.flatnonzero(~layout.visual)
    behind = len(layout) + np.arange(len(said))
    ids = np.concatenate([layout.token_ids[text].astype(np.int64), said])
    after = np.tile(behind + layout.rope_delta, (len(layout.positions), 1))
    places = np.concatenate([layout.positions[:, text].astype(np.int64), after], 1)
    return torch.from_numpy(ids), torch.from_numpy(places), torch.from_numpy(np.concatenate([text, behind]))
