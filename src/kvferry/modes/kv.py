"""``kv``: the edge prefills and sends its compressed cache; the cloud decodes it while it arrives and resumes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from kvferry.bitstream import MAX_TIERS, Reader
from kvferry.bitstream.bounds import Bounds
from kvferry.bitstream.header import codec_of, lossless
from kvferry.cache import KVCache
from kvferry.codecs.grammar import without_files
from kvferry.errors import DeadlineError, FingerprintError, InputError, TruncatedError
from kvferry.modes.base import Question, SessionStore
from kvferry.modes.checks import check_question, cut
from kvferry.modes.digests import made_digest, pixel_digest
from kvferry.modes.holdings import Holdings
from kvferry.modes.receiver import ModeReceiver
from kvferry.pictures import open_picture
from kvferry.recipe import Recipe, write_frames
from kvferry.summary import Summary, summarise_cache
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import ProtocolError

if TYPE_CHECKING:
    from kvferry.bounds import ModelBounds
    from kvferry.evidence import Prefilled
    from kvferry.models import VLM
    from kvferry.selection.tiers import Importance

MAX_STEPS = 4
"""Caches that may be sent one after the other."""
_STEP = ";"
COPIES = 3
"""Of a decoded cache that are in memory at once: as it arrived, as it is put together, and as the model takes it."""


@dataclass(frozen=True)
class KVMode:
    """``kv``, ``kv:snapkv@0.25|int4``, ``kv:vlcache@0.05|int2;full|int4``.

    Several recipes are steps: one prefill, one whole cache after the other, each better than those before. The cloud
    answers from the last one that is there when it must, so that a small cache is what a bad moment of the link costs,
    and its few bytes are what a good one costs. As simulcast is to scalable coding, it needs nothing of the codecs.

    Parameters
    ----------
    recipes : tuple of Recipe
        Which tokens, in how few bits; at most :data:`MAX_STEPS`.
    """

    NAME: ClassVar[str] = "kv"
    LEAVES: ClassVar[tuple[str, ...]] = ()
    recipes: tuple[Recipe, ...]

    @classmethod
    def parse(cls, options: str) -> KVMode:
        """The mode of ``kv:options``."""
        return cls(tuple(Recipe.parse(text) for text in _steps(options)))

    @property
    def needs_model(self) -> bool:
        """Whether the edge must hold a model."""
        return True

    def __str__(self) -> str:
        return f"kv:{_STEP.join(map(str, self.recipes))}"

    def sender(self, vlm: VLM | None, question: Question, holdings: Holdings) -> KVSender:
        """The edge's half."""
        if vlm is None:
            raise InputError("mode kv needs the cloud's model on this side too; load it, or use mode image")
        return KVSender(self.recipes, vlm, question, holdings)


class KVSender:
    """The edge's half.

    With the question (protocol A) it is part of the prompt and may guide the selection. Shipped first (protocol B), the
    scene is prefilled and selected without looking at the question, which the cloud then asks; a session holds it for
    further questions. What has been sent is kept as the bytes it was, so that sending it again is sending the same.
    """

    MODE: ClassVar[pb.Mode] = pb.MODE_KV

    def __init__(self, recipes: Sequence[Recipe], vlm: VLM, question: Question, holdings: Holdings) -> None:
        self.bf16_bytes: int | None = None
        self.kept: Summary | None = None
        self.prefill_seconds = self.encode_seconds = 0.0
        self._recipes = tuple(recipes)
        self._vlm = vlm
        self._question = _read(question) if question.ship_first else question
        self._holdings = holdings
        self._scene = self._scene_digest() if question.ship_first else b""
        self._item: pb.AskRequest.Item | None = None
        self._prefilled: Prefilled | None = None
        self._stream: list[bytes] = []
        self._complete = False

    def start(self) -> pb.AskRequest.Start:
        check_question(self._question.text)
        if not 1 <= self._question.tiers <= MAX_TIERS:
            raise InputError(f"a cache travels in 1 to {MAX_TIERS} tiers, not {self._question.tiers}")
        start = pb.AskRequest.Start(mode=self.MODE, fingerprint=self._vlm.fingerprint)
        start.recipe = _STEP.join(without_files(str(recipe)) for recipe in self._recipes)
        if self._question.ship_first:
            self._item = self._holdings.item(self._scene)
            start.question = self._question.text
            start.items.append(self._item)
            start.session, start.hold = self._holdings.session, self._holdings.hold
        return start

    def prepare(self) -> None:
        if self._prefilled is not None or self._complete:
            return
        if self._held:
            self.bf16_bytes, self.kept = self._holdings.noted(self._scene) or (None, None)
            return
        began = time.perf_counter()
        *earlier, last = self._recipes
        requests = [request for recipe in earlier for request in recipe.requests]
        prefilled = self._question.prefilled(self._vlm, recipe=last, requests=requests)
        # the cloud knows its model by the fingerprint
        self._prefilled = replace(prefilled, cache=replace(prefilled.cache, model_name=""))
        self.bf16_bytes = self._prefilled.cache.full_bf16_bytes
        self.prefill_seconds = time.perf_counter() - began

    def chunks(self) -> Iterator[bytes]:
        if self._held:
            return
        if self._complete:
            yield from self._stream
            return
        if self._prefilled is None:
            raise InputError("nothing to send yet; call prepare() first")
        stream: list[bytes] = []  # its own: a call that broke off may still be at its last piece
        # each cache begins with a chunk of its own, by which the cloud tells them apart
        pieces = chain.from_iterable(cut(self._pieces(self._prefilled, recipe)) for recipe in self._recipes)
        while True:
            began = time.perf_counter()
            piece = next(pieces, None)
            self.encode_seconds += time.perf_counter() - began
            if piece is None:
                break
            stream.append(piece)
            yield piece
        self._stream, self._complete, self._prefilled = stream, True, None
        if self._question.ship_first:
            self._holdings.note(self._scene, (self.bf16_bytes, self.kept))

    @property
    def _held(self) -> bool:
        """Whether the cloud holds the scene, as far as is known."""
        return self._item is not None and bool(self._item.handle)

    def _scene_digest(self) -> bytes:
        what = "scene" if self.MODE == pb.MODE_KV else f"scene {self.MODE}"
        how = f"{_STEP.join(map(str, self._recipes))} {self._vlm.fingerprint}"
        return made_digest(what, how, [pixel_digest(picture) for picture in self._question.images])

    def _pieces(self, prefilled: Prefilled, recipe: Recipe) -> Iterator[bytes]:
        tiers = self._question.tiers
        kept, importance = self._ranked(prefilled, recipe, tiers)
        self.kept = summarise_cache(kept)
        yield from write_frames(kept, recipe, importance, tiers)

    def _ranked(self, prefilled: Prefilled, recipe: Recipe, tiers: int) -> tuple[KVCache, Importance | None]:
        """What is sent, and how important each of its tokens is."""
        return recipe.rank(prefilled, tiers)


def _read(question: Question) -> Question:
    """The question with its pictures read, once: what a digest names is what is prefilled, whatever a file becomes."""
    return replace(question, images=[open_picture(image) for image in question.images])


class KVReceiver(ModeReceiver):
    """The cloud's half.

    Raises
    ------
    FingerprintError
        The cache was made by another model.
    VersionError
        This version does not have the recipe's codec or lossless stage.
    """

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, store: SessionStore, max_bytes: int) -> None:
        del max_bytes  # a bitstream's unfolded size is bounded by its reader, and by the model's own shape
        model = self._model(vlm, start)
        steps = _steps(start.recipe)
        for recipe in steps:
            codec_of(recipe)
            lossless(recipe)
        if len(start.items) > 1 or (start.items and not start.question):
            raise ProtocolError("mode kv brings one scene, and with it a question; update the edge")
        if start.question:
            check_question(start.question, vlm.bounds.longest)
        self._vlm = vlm
        self._question = start.question or None
        self._item = start.items[0] if start.items else None
        self._store = store
        self._steps = len(steps)
        self._bounds = Bounds(tokens=vlm.bounds.tokens, model=model)
        self._readers = [self._reader()]
        self._cache = store.take(self._item.handle, KVCache) if self._item and self._item.handle else None

    def _model(self, vlm: VLM, start: pb.AskRequest.Start) -> ModelBounds:
        """What a cache can be of the model that must have made it; refuses any other."""
        _check_fingerprint(start.fingerprint, vlm)
        return vlm.bounds

    def feed(self, data: bytes) -> None:
        if self._cache is not None:
            raise ProtocolError("bytes for a scene that the session holds already; update the edge")
        if self._readers[-1].complete and len(self._readers) < self._steps:
            self._readers.append(self._reader())
        self._store.reserve(len(data))
        self._readers[-1].feed(data)

    def finish(self) -> None:
        if self._cache is None:
            if len(self._readers) < self._steps and self._readers[-1].complete:
                raise TruncatedError(f"{len(self._readers)} of {self._steps} caches came; have the stream sent again")
            self._take(self._readers[-1].cache())

    def _take(self, cache: KVCache, whole: bool = True) -> None:
        """This is what the answer is given from; a scene of which nothing is missing is kept for further questions."""
        self._cache = cache
        if whole and self._item is not None and not len(cache.pending):
            self._store.put(self._item.digest, cache, cache.nbytes)

    def _reader(self) -> Reader:
        return Reader(bounds=self._bounds, reserve=lambda nbytes: self._store.reserve(COPIES * nbytes))

    def settle(self) -> float:
        if self._cache is not None:
            return 1.0
        whole = [reader for reader in self._readers if reader.complete]
        if whole:
            self._take(whole[-1].cache(), whole=False)
            return len(whole) / self._steps
        try:
            partial = self._readers[0].partial()
        except TruncatedError:
            raise DeadlineError(
                f"when it was time to answer, {self._readers[0].total_bytes} bytes had arrived and some layer had "
                "nothing; allow more time, send less (a smaller recipe), or in more tiers"
            ) from None
        self._take(partial.cache, whole=False)
        return partial.share / self._steps

    @property
    def bf16_bytes(self) -> int:
        return 0 if self._cache is None else self._cache.full_bf16_bytes

    def ground(self) -> tuple[KVCache, str | None]:
        if self._cache is None:
            raise ProtocolError("no cache has arrived; update the edge")
        return self._cache, self._question


def _steps(text: str) -> list[str]:
    """The recipes of a text, first to last."""
    steps = [part.strip() for part in text.split(_STEP)]
    if len(steps) > MAX_STEPS:
        raise InputError(f"{len(steps)} caches one after the other; at most {MAX_STEPS} are sent")
    return steps


def _check_fingerprint(fingerprint: str, vlm: VLM) -> None:
    if fingerprint != vlm.fingerprint:
        raise FingerprintError(
            f"the cache was made by model {fingerprint[:12] or '(none named)'}, the cloud serves {vlm.name} "
            f"({vlm.fingerprint[:12]}); load the same model on both ends, or send the picture (mode image)"
        )
