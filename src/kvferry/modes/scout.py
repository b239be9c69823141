"""``scout``: the edge's small model finds out which pieces of the pictures matter; the cloud's model reads those.

W.-L. Cheng and W. Liao, "Scout: Bandwidth-Adaptive KV-Cache Transport for Heterogeneous Edge-Cloud LLM Inference"
(2026). There, positions are a list of 16-bit numbers; here they are one set in the smallest of three forms, and in
later questions about the same pictures the difference to the last set where that is smaller.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvferry.bitstream.records import CHECKSUM, crc32c, parse
from kvferry.bitstream.sets import Grids, Mask, decode_set, encode_set
from kvferry.errors import CorruptError, FingerprintError, InputError, TruncatedError
from kvferry.modes.base import Question, SessionStore
from kvferry.modes.checks import check_question, cut
from kvferry.modes.digests import made_digest, set_digest
from kvferry.modes.files import FilesIn, FilesOut
from kvferry.modes.holdings import Holdings
from kvferry.modes.ranking import DEFAULT_SCORER, checked_ranking, kept_visual, selection_of
from kvferry.modes.receiver import NeedsAll
from kvferry.pictures import file_of
from kvferry.pictures.familiar import note_on
from kvferry.recipe import Recipe
from kvferry.selection import evict
from kvferry.wire import modes_pb2
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import ProtocolError

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM
    from kvferry.models.steps import Pace, Steps
    from kvferry.summary import Summary

DEFAULT_FRACTION = 0.25
SET_BYTES = (1 << 14) // 8 + 64
"""Most that a set of a prompt's visual tokens takes, of which there are at most 16,384."""


@dataclass(frozen=True)
class ScoutMode:
    """``scout``, ``scout:keydiff@0.5``.

    Parameters
    ----------
    ranking : Recipe
        A scorer and the fraction of the visual tokens that stay, exact to a token. All text stays. How many rankings
        become one: :func:`kvferry.modes.ranking.kept_visual`.
    """

    NAME: ClassVar[str] = "scout"
    LEAVES: ClassVar[tuple[str, ...]] = ("pixels",)
    ranking: Recipe = field(default_factory=lambda: Recipe(DEFAULT_SCORER, DEFAULT_FRACTION))

    def __post_init__(self) -> None:
        checked_ranking(self.ranking, "mode scout")

    @classmethod
    def parse(cls, options: str) -> ScoutMode:
        """The mode of ``scout:options``."""
        return cls(Recipe.parse(options)) if options else cls()

    @property
    def needs_model(self) -> bool:
        """Whether the edge must hold a model."""
        return True

    def __str__(self) -> str:
        return f"scout:{str(self.ranking).partition('|')[0]}"

    def sender(self, vlm: VLM | None, question: Question, holdings: Holdings) -> ScoutSender:
        """The edge's half."""
        if vlm is None:
            raise InputError("mode scout needs a model of the cloud's family on this side; load one, or use mode image")
        return ScoutSender(self.ranking, vlm, question, holdings)


class ScoutSender:
    """The edge's half. The picture travels as a file, and only while the session does not hold it."""

    bf16_bytes: int | None = None
    kept: Summary | None = None

    def __init__(self, ranking: Recipe, vlm: VLM, question: Question, holdings: Holdings) -> None:
        self.prefill_seconds = self.encode_seconds = 0.0
        self._ranking = ranking
        self._vlm = vlm
        self._question = question
        self._holdings = holdings
        self._files = FilesOut([file_of(x, keep_metadata=question.keep_metadata) for x in question.images], holdings)
        self._scene = made_digest("scene", "scout", self._files.digests)
        self._found: tuple[Mask, Grids] | None = None

    def start(self) -> pb.AskRequest.Start:
        check_question(self._question.text)
        return pb.AskRequest.Start(
            mode=pb.MODE_SCOUT,
            question=self._question.text,
            fingerprint=self._vlm.prompt_fingerprint,
            items=self._files.items(),
            session=self._holdings.session,
            hold=self._holdings.hold,
        )

    def prepare(self) -> None:
        if self._found is not None:
            return
        began = time.perf_counter()
        recipe = self._ranking if self._question.images else None
        prefilled = self._vlm.prefill(self._question.images, self._question.text, recipe=recipe)
        self._found = kept_visual(prefilled, self._ranking), prefilled.cache.layout.grids
        self.prefill_seconds = time.perf_counter() - began

    def chunks(self) -> Iterator[bytes]:
        return cut(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        if self._found is None:
            raise InputError("nothing to send yet; call prepare() first")
        yield from self._files
        began = time.perf_counter()
        mask, grids = self._found
        data = sealed(self._smallest(mask, grids), len(mask))
        self._holdings.note(self._scene, mask)
        self.encode_seconds = time.perf_counter() - began
        yield data

    def _smallest(self, mask: Mask, grids: Grids) -> modes_pb2.PositionSet:
        """The whole set, or what changed since the last one that the cloud holds."""
        whole = encode_set(mask, grids)
        base = self._holdings.noted(self._scene)
        if base is None or len(base) != len(mask):
            return whole
        handle = self._holdings.handle(set_digest(base, self._files.digests))
        if not handle:
            return whole
        return min(whole, encode_set(mask, grids, base, handle), key=lambda message: message.ByteSize())


def sealed(message: modes_pb2.PositionSet, tokens: int) -> bytes:
    """Positions as they cross the wire: the message, and a CRC-32C of how many visual tokens there are and of it."""
    data = message.SerializeToString()
    return data + CHECKSUM.pack(_checksum(data, tokens))


def _checksum(data: bytes, tokens: int) -> int:
    return crc32c(CHECKSUM.pack(tokens) + data)


class ScoutReceiver(NeedsAll):
    """The cloud's half.

    Raises
    ------
    FingerprintError
        The edge splits words or pictures differently, so that its positions would name other tokens here.
    """

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, store: SessionStore, max_bytes: int) -> None:
        check_question(start.question, vlm.bounds.longest)
        if start.fingerprint != vlm.prompt_fingerprint:
            raise FingerprintError(
                f"the positions come from the tokenizer and patch grid {start.fingerprint[:12] or '(none named)'}, "
                f"{vlm.name} has {vlm.prompt_fingerprint[:12]}; load a model of the same family on the edge, or send "
                "the picture (mode image)"
            )
        if start.items and not vlm.has_vision:
            raise InputError(f"{vlm.name} reads text only; ask without a picture")
        self.prefill_seconds = 0.0
        self._vlm = vlm
        self._question = start.question
        self._files = FilesIn(start.items, store, max_bytes, vlm.visual_tokens, vlm.reduced)
        self._store = store
        self._left = self._files.announced
        self._data = bytearray()
        self._base: Mask | None = None

    @property
    def reads(self) -> int:
        return self._files.tokens

    def feed(self, data: bytes) -> None:
        files = min(len(data), self._left)
        if files:
            self._left -= files
            self._files.feed(data[:files])
        if len(self._data) + len(data) - files > SET_BYTES:
            raise ProtocolError("more bytes than the announced pictures and a set of their tokens take")
        self._data += data[files:]

    def finish(self) -> None:
        pictures = self._files.open()
        self.note = note_on(self._vlm, self._files.sizes)
        self._body, checksum = bytes(self._data[: -CHECKSUM.size]), self._data[-CHECKSUM.size :]
        if len(checksum) < CHECKSUM.size:
            raise TruncatedError("the positions did not arrive; send them again")
        (self._checksum,) = CHECKSUM.unpack(checksum)
        self._message = parse(modes_pb2.PositionSet, self._body)
        if self._message.base:
            self._base = self._store.take(self._message.base, np.ndarray)
        began = time.perf_counter()
        self._prompt = self._vlm.prompt_of(pictures, self._question)  # not in the model's own thread
        self.prefill_seconds = time.perf_counter() - began

    def grounding(self, pace: Pace) -> Steps[tuple[KVCache, str | None]]:
        from kvferry.models.steps import read

        began = time.perf_counter()
        prompt, layout, _ = self._prompt
        cache = yield from read(self._vlm.model, prompt.inputs, layout, self._vlm.fingerprint, pace)
        layout = cache.layout
        tokens = int(layout.visual.sum())
        if self._checksum != _checksum(self._body, tokens):
            raise CorruptError(
                f"the positions arrived damaged (checksum), or are not of the {tokens} visual tokens that these "
                "pictures have here; send them again, and have the same kvferry and image processor on both ends"
            )
        mask = decode_set(self._message, tokens, layout.grids, self._base)
        self._store.put(set_digest(mask, self._files.digests), mask, mask.nbytes)
        kept = evict(cache, selection_of(cache, mask))
        self.prefill_seconds += time.perf_counter() - began
        return kept, None
