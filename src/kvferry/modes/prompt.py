"""``prompt``: words only; the cloud does all the work. For questions without pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvferry.errors import InputError
from kvferry.modes.base import Question, SessionStore
from kvferry.modes.checks import check_question
from kvferry.modes.holdings import Holdings
from kvferry.modes.receiver import NeedsAll
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import ProtocolError

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM
    from kvferry.models.steps import Pace, Steps
    from kvferry.summary import Summary


@dataclass(frozen=True)
class PromptMode:
    """``prompt``. It has no options."""

    NAME: ClassVar[str] = "prompt"
    LEAVES: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def parse(cls, options: str) -> PromptMode:
        """The mode of ``prompt``."""
        if options:
            raise InputError(f"mode prompt takes no options; leave out {options!r}")
        return cls()

    @property
    def needs_model(self) -> bool:
        """Whether the edge must hold a model."""
        return False

    def __str__(self) -> str:
        return "prompt"

    def sender(self, vlm: VLM | None, question: Question, holdings: Holdings) -> PromptSender:
        """The edge's half; needs no model."""
        del vlm, holdings
        if question.images:
            raise InputError("mode prompt sends words only; leave the pictures out, or use mode image")
        return PromptSender(question.text)


class PromptSender:
    """The edge's half. The question travels in the start."""

    bf16_bytes: int | None = None
    kept: Summary | None = None
    prefill_seconds = encode_seconds = 0.0

    def __init__(self, text: str) -> None:
        self._text = text

    def start(self) -> pb.AskRequest.Start:
        check_question(self._text)
        return pb.AskRequest.Start(mode=pb.MODE_PROMPT, question=self._text)

    def prepare(self) -> None:
        """Nothing is left to do."""

    def chunks(self) -> Iterator[bytes]:
        return iter(())


class PromptReceiver(NeedsAll):
    """The cloud's half."""

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, store: SessionStore, max_bytes: int) -> None:
        del store, max_bytes
        check_question(start.question, vlm.bounds.longest)
        if start.items:
            raise ProtocolError("mode prompt brings no pictures; use mode image")
        self.prefill_seconds = 0.0
        self._vlm = vlm
        self._question = start.question

    def feed(self, data: bytes) -> None:
        if data:
            raise ProtocolError("mode prompt brings no bytes beside the question")

    def finish(self) -> None:
        """Nothing follows the start."""

    def grounding(self, pace: Pace) -> Steps[tuple[KVCache, str | None]]:
        from kvferry.models.steps import reading

        began = time.perf_counter()
        cache = yield from reading(self._vlm, (), self._question, pace)
        self.prefill_seconds = time.perf_counter() - began
        return cache, None
