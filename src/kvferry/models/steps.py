"""The work on a question in steps: between two of them somebody may call it off, or let another question go on.

A generator yields after every pass of the model and returns what it made. Prompts and old answers are read in parts
whose size follows from how fast the last ones were (:class:`Pace`), so that a step takes :data:`STEP_SECONDS` or so.
One pass is a step where only a whole pass is right: pictures whose tokens see each other or enter several layers, and
frequencies that follow from the length of a pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import DynamicCache, PreTrainedModel

from kvferry.cache import KVCache, PromptLayout, Role
from kvferry.models.attention import Session, attached, session
from kvferry.models.embeds import placed
from kvferry.models.layout import Inputs
from kvferry.models.prefill import layers_from, model_inputs, read_prompt
from kvferry.models.resume import Decoder
from kvferry.models.rotary import moves
from kvferry.models.support import tied_heads

if TYPE_CHECKING:
    from kvferry.models.vlm import VLM

T = TypeVar("T")
Steps = Generator[None, None, T]
STEP_SECONDS = 0.05
LEAST, MOST = 16, 2048
"""Tokens of one part."""
PLACED = ("qwen2_vl", "qwen2_5_vl")
"""Families whose pictures are one embedding per token and no more, seen by later tokens only."""


def finished(steps: Steps[T]) -> T:
    """All steps, one after the other."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


class Pace:
    """How many tokens may be read at once so that it takes :data:`STEP_SECONDS`: a power of two.

    Parameters
    ----------
    part : int
        To begin with.
    heard : callable, optional
        Is told what is noted.
    """

    def __init__(self, part: int = 256, heard: Callable[[int, float], None] | None = None) -> None:
        self.part = part
        self._heard = heard

    def note(self, tokens: int, seconds: float) -> None:
        """So many took so long. The next part is at most twice this one."""
        if self._heard is not None:
            self._heard(tokens, seconds)
        fits = 1 << int(math.log2(max(tokens * STEP_SECONDS / max(seconds, 1e-6), LEAST)))
        self.part = min(fits, 2 * self.part, MOST)


def fed(decoder: Decoder, token_ids: Sequence[int], pace: Pace) -> Steps[None]:
    """Feed tokens on top of a cache. Where frequencies follow from a pass's length, each has one of its own."""
    at = 0
    while at < len(token_ids):
        some = token_ids[at : at + (1 if moves(decoder.model) else pace.part)]
        began = time.perf_counter()
        decoder.feed(some)
        if len(some) > LEAST:
            pace.note(len(some), time.perf_counter() - began)
        at += len(some)
        yield


def recalled(
    model: PreTrainedModel,
    cache: KVCache,
    token_ids: Sequence[int],
    said: Sequence[int],
    roles: Sequence[Role],
    pace: Pace,
) -> Steps[KVCache]:
    """The longer cache that :func:`continue_from` keeps, of an answer that was given before.

    The tokens of the question and the answer are read in parts, not one by one as they were said: the same cache but
    for rounding, and to the bit where the model computes steadily (:mod:`kvferry.models.steady`).
    """
    with attached(model):
        decoder = Decoder(model, cache)
        yield from fed(decoder, [*token_ids, *said], pace)
        return decoder.cache([*roles, *[Role.CONTEXT] * len(said)])


def brought_up(
    vlm: VLM,
    cache: KVCache,
    question: str | None,
    said: Iterable[Sequence[int]],
    asked: Iterable[str],
    pace: Pace,
) -> Steps[tuple[KVCache, str | None]]:
    """A cache with what was said on top of it, and the question that is to be answered.

    Parameters
    ----------
    question : str or None
        The first one, where ``cache`` does not hold it.
    said, asked
        Each answer's token ids, and the question that followed.
    """
    for answer, following in zip(said, asked, strict=True):
        vlm.check(cache)
        feed, roles = vlm.feed(cache, question, len(answer))
        cache = yield from recalled(vlm.model, cache, feed, list(answer), roles, pace)
        question = following
    return cache, question


def reading(vlm: VLM, images: Sequence[Any], question: str | None, pace: Pace, messages: Any = None) -> Steps[KVCache]:
    """The cache of a prompt with its question, as :meth:`VLM.prefill` makes it without evidence."""
    prompt, layout, _ = vlm.prompt_of(images, question, messages)
    yield
    return (yield from read(vlm.model, prompt.inputs, layout, vlm.fingerprint, pace))


def read(
    model: PreTrainedModel, inputs: Inputs, layout: PromptLayout, fingerprint: str, pace: Pace
) -> Steps[KVCache]:
    """A prompt's cache, of all its tokens but the last; in one pass if that is short enough, or must be."""
    n = len(layout)
    if n <= pace.part or not in_parts(model, inputs, layout):
        began = time.perf_counter()
        whole = read_prompt(model, inputs, layout, (), length=max(1, n - 1), fingerprint=fingerprint)
        pace.note(n, time.perf_counter() - began)
        yield
        return whole.cache
    given = model_inputs(model, inputs, layout)
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    if "pixel_values" in given:
        with torch.inference_mode():
            seen = model.get_image_features(
                given["pixel_values"], image_grid_thw=given["image_grid_thw"], return_dict=True
            ).pooler_output
        embeds, ids = placed(model, ids, layout.visual, torch.cat(list(seen))), None
        yield
    past, first, positions = DynamicCache(), 0, given["position_ids"]
    while first < n - 1:
        some = slice(first, min(first + pace.part, n - 1))
        words = {"input_ids": ids[:, some]} if embeds is None else {"inputs_embeds": embeds[:, some]}
        began = time.perf_counter()
        with torch.inference_mode(), session(Session()):
            model(**words, position_ids=positions[..., some], past_key_values=past, use_cache=True, logits_to_keep=1)
        pace.note(some.stop - first, time.perf_counter() - began)
        first = some.stop
        yield
    name = str(getattr(model, "name_or_path", ""))
    layers = layers_from(past, n - 1)
    return KVCache(layers, layout, n - 1, fingerprint, model_name=name, tied_heads=tied_heads(model))


def in_parts(model: PreTrainedModel, inputs: Inputs, layout: PromptLayout) -> bool:
    """Whether a prompt may be read in several passes."""
    if moves(model):
        return False
    if not layout.visual.any():
        return True
    pictures = "visual_embeds" in inputs or ("pixel_values" in inputs and "image_grid_thw" in inputs)
    return pictures and "pixel_values_videos" not in inputs and model.config.model_type in PLACED
