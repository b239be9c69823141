"""``translate``: the small edge model's cache crosses; the cloud turns it into one of its own larger model.

Only what the pictures became crosses, compressed by any recipe. The text's token ids are in the stream's header anyway,
and the cloud's model reads it itself on top of the translated visual tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvferry.cache import KVCache, LayerCache
from kvferry.errors import DeadlineError, FingerprintError, InputError
from kvferry.lazy import torch
from kvferry.modes.base import Question, SessionStore
from kvferry.modes.holdings import Holdings
from kvferry.modes.kv import KVMode, KVReceiver, KVSender
from kvferry.modes.receiver import NeedsAll
from kvferry.modes.translators import find
from kvferry.recipe import Recipe
from kvferry.translator import CHUNK, turns, width
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.bounds import ModelBounds
    from kvferry.evidence import Prefilled
    from kvferry.models import VLM
    from kvferry.models.steps import Pace, Steps
    from kvferry.selection.tiers import Importance


DEFAULT = "full|int8|zstd"


@dataclass(frozen=True)
class TranslateMode:
    """``translate``, ``translate:full|int4``, ``translate:full|int2;full|int8`` (steps, as in ``kv``).

    Parameters
    ----------
    recipes : tuple of Recipe
        Of the edge's own cache. All layers and heads keep the same tokens (``full``, or ``budget=shared``), for a token
        is translated from all of them together.
    """

    NAME: ClassVar[str] = "translate"
    LEAVES: ClassVar[tuple[str, ...]] = ()
    recipes: tuple[Recipe, ...]

    @classmethod
    def parse(cls, options: str) -> TranslateMode:
        """The mode of ``translate:options``."""
        return cls(KVMode.parse(options or DEFAULT).recipes)

    @property
    def needs_model(self) -> bool:
        """Whether the edge must hold a model."""
        return True

    def __str__(self) -> str:
        return str(KVMode(self.recipes)).replace(KVMode.NAME, self.NAME, 1)

    def sender(self, vlm: VLM | None, question: Question, holdings: Holdings) -> TranslateSender:
        """The edge's half."""
        if vlm is None:
            raise InputError("mode translate needs a model on this side; load one, or use mode image")
        return TranslateSender(self.recipes, vlm, question, holdings)


class TranslateSender(KVSender):
    """The edge's half: that of mode ``kv``, without the text's keys and values."""

    MODE = pb.MODE_TRANSLATE

    def start(self) -> pb.AskRequest.Start:
        start = super().start()
        start.prompts = self._vlm.prompt_fingerprint
        return start

    def _ranked(self, prefilled: Prefilled, recipe: Recipe, tiers: int) -> tuple[KVCache, Importance | None]:
        kept, importance = super()._ranked(prefilled, recipe, tiers)
        return visual_part(kept, importance)


def visual_part(kept: KVCache, importance: Importance | None = None) -> tuple[KVCache, Importance | None]:
    """What a cache keeps of pictures, and how important that is.

    Raises
    ------
    InputError
        Layers or heads keep different tokens.
    """
    where = kept.layers[0].positions[:1]
    if any(x.counts or not torch.equal(x.positions, where.expand(x.heads, -1)) for x in kept):
        raise InputError(
            f"a token is translated from all layers and heads together, but with {kept.recipe} they keep different "
            "tokens; add budget=shared to the selection (leaveout@0.25,budget=shared)"
        )
    visual = torch.from_numpy(kept.layout.visual).to(where.device)[where[0]]
    index = torch.nonzero(visual)[:, 0]
    layers = tuple(x.take(index.expand(x.heads, -1)) for x in kept)
    chosen = None if importance is None else tuple(x[:, index.to(x.device)] for x in importance)
    return replace(kept, layers=layers, scored=()), chosen


class TranslateReceiver(KVReceiver):
    """The cloud's half. What it holds of a scene is the translated cache, of its own model.

    Raises
    ------
    FingerprintError
        The two models split words or pictures differently, or there is no translator for the pair.
    """

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, store: SessionStore, max_bytes: int) -> None:
        super().__init__(vlm, start, store, max_bytes)
        self._come: KVCache | None = None
        self._whole = False

    def _model(self, vlm: VLM, start: pb.AskRequest.Start) -> ModelBounds:
        if start.prompts != vlm.prompt_fingerprint:
            raise FingerprintError(
                f"the cache's prompt was made by tokenizer and patch grid {start.prompts[:12] or '(none named)'}, "
                f"{vlm.name} has {vlm.prompt_fingerprint[:12]}; load a model of the same family on the edge, or send "
                "the picture (mode image)"
            )
        self._translator = find(start.fingerprint, vlm.fingerprint, vlm.name)
        turns(vlm.rotary)
        return replace(vlm.bounds, fingerprint=start.fingerprint, shapes=self._translator.shapes)

    def _take(self, cache: KVCache, whole: bool = True) -> None:
        """Translate, which is not for the model's own thread."""
        began = time.perf_counter()
        small = shared_part(cache)
        visual = cache.layout.visual[: cache.length]
        if not whole and visual.any() and not small.layers[0].kept:
            raise DeadlineError(
                "when it was time to answer, no piece of a picture had arrived in all layers; allow more time, or send "
                "less"
            )
        tokens, most = small.layers[0].kept, min(small.layers[0].kept, CHUNK)
        translator = self._translator
        numbers = 3 * tokens * width(translator.target_shapes)
        numbers += most * (2 * width(translator.shapes) + 2 * width(translator.target_shapes) + 2 * translator.hidden)
        self._store.reserve(4 * numbers)
        self._index = small.layers[0].positions[0]
        self._pairs = translator(small.layers, cache.layout, self._vlm.rotary, self._index)
        self._cache = self._come = small
        self._whole = whole
        self.prefill_seconds += time.perf_counter() - began

    def ground(self) -> tuple[KVCache, str | None]:
        return NeedsAll.ground(self)  # type: ignore[arg-type]

    def grounding(self, pace: Pace) -> Steps[tuple[KVCache, str | None]]:
        from kvferry.models.translated import read_on

        if self._come is None:
            yield
            return super().ground()
        began = time.perf_counter()
        come = self._come
        cache = yield from read_on(self._vlm, come.layout, come.length, self._pairs, self._index, pace)
        if self._whole and self._item is not None and not len(cache.pending):
            self._store.put(self._item.digest, cache, cache.nbytes)
        self.prefill_seconds += time.perf_counter() - began
        return cache, self._question


def shared_part(cache: KVCache) -> KVCache:
    """The visual tokens that all layers and heads hold: layers of a stream that was cut short may differ."""
    held = cache.layout.visual[: cache.length].copy()
    for layer in cache:
        for head in layer.split():
            mine = np.zeros(cache.length, bool)
            mine[head.positions.cpu().numpy()] = True
            held &= mine
    where = torch.from_numpy(np.flatnonzero(held))
    return replace(cache, layers=tuple(_only(layer, where) for layer in cache))


def _only(layer: LayerCache, where: torch.Tensor) -> LayerCache:
    """The tokens ``where`` (int64 ``[k]``) of a layer that has them in all heads."""
    heads = []
    for head in layer.split():
        index = torch.searchsorted(head.positions[0].contiguous(), where.to(head.positions.device))
        heads.append(head.take(index[None]))
    return LayerCache.join(heads)
