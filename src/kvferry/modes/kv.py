"""``kv``: the edge prefills and sends its compressed cache; the cloud decodes it while it arrives and resumes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvferry.bitstream import MAX_TIERS, Reader
from kvferry.errors import FingerprintError, InputError
from kvferry.modes.base import OnToken, cut
from kvferry.recipe import Recipe, write_frames
from kvferry.summary import Summary, summarise_cache
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.evidence import Prefilled
    from kvferry.models import VLM, Continuation


class KVSender:
    """The edge's half.

    Parameters
    ----------
    ship_first : bool
        Protocol B: the scene is prefilled and selected without looking at the question, which the cloud then asks.
        Otherwise (protocol A) the question is part of the prompt and may guide the selection.
    tiers : int
        See :func:`kvferry.compress`.
    """

    def __init__(
        self,
        vlm: VLM,
        images: Sequence[Any],
        question: str,
        recipe: str | Recipe,
        ship_first: bool = False,
        tiers: int = 1,
    ) -> None:
        self.bf16_bytes: int | None = None
        self.kept: Summary | None = None
        self.prefill_seconds = self.encode_seconds = 0.0
        self._vlm = vlm
        self._images = images
        self._question = question
        self._recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
        self._ship_first = ship_first
        self._tiers = tiers
        self._prefilled: Prefilled | None = None

    def start(self) -> pb.AskRequest.Start:
        if not self._question.strip():
            raise InputError("the question is empty; ask something")
        if not 1 <= self._tiers <= MAX_TIERS:
            raise InputError(f"a cache travels in 1 to {MAX_TIERS} tiers, not {self._tiers}")
        return pb.AskRequest.Start(
            mode=pb.MODE_KV,
            fingerprint=self._vlm.fingerprint,
            recipe=str(self._recipe),
            question=self._question if self._ship_first else "",
        )

    def prepare(self) -> None:
        began = time.perf_counter()
        question = None if self._ship_first else self._question
        prefilled = self._vlm.prefill(self._images, question, recipe=self._recipe)
        # the cloud knows its model by the fingerprint
        self._prefilled = replace(prefilled, cache=replace(prefilled.cache, model_name=""))
        self.bf16_bytes = self._prefilled.cache.full_bf16_bytes
        self.prefill_seconds = time.perf_counter() - began

    def chunks(self) -> Iterator[bytes]:
        if self._prefilled is None:
            raise InputError("nothing to send yet; call prepare() first")
        pieces = cut(self._pieces(self._prefilled))
        while True:
            began = time.perf_counter()
            piece = next(pieces, None)
            self.encode_seconds += time.perf_counter() - began
            if piece is None:
                return
            yield piece

    def _pieces(self, prefilled: Prefilled) -> Iterator[bytes]:
        kept, importance = self._recipe.rank(prefilled, self._tiers)
        self.kept = summarise_cache(kept)
        yield from write_frames(kept, self._recipe, importance, self._tiers)


class KVReceiver:
    """The cloud's half.

    Raises
    ------
    FingerprintError
        The cache was made by another model.
    RecipeError
        This version does not know the recipe.
    """

    prefill_seconds = 0.0

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, max_bytes: int) -> None:
        del max_bytes  # a bitstream's unfolded size is bounded by its reader
        _check_fingerprint(start.fingerprint, vlm)
        Recipe.parse(start.recipe)
        self._vlm = vlm
        self._question = start.question or None
        self._reader = Reader()

    def feed(self, data: bytes) -> None:
        self._reader.feed(data)
        if self._reader.header is not None:
            _check_fingerprint(self._reader.header.fingerprint, self._vlm)

    def finish(self) -> None:
        self._reader.cache()

    def answer(self, max_new_tokens: int, on_token: OnToken) -> Continuation:
        return self._vlm.resume(self._reader.cache(), self._question, max_new_tokens=max_new_tokens, on_token=on_token)


def _check_fingerprint(fingerprint: str, vlm: VLM) -> None:
    if fingerprint != vlm.fingerprint:
        raise FingerprintError(
            f"the cache was made by model {fingerprint[:12] or '(none named)'}, the cloud serves {vlm.name} "
            f"({vlm.fingerprint[:12]}); load the same model on both ends, or send the picture (mode image)"
        )
