"""Turns of a conversation, whatever the mode: the cloud keeps what the last answer left, or is told all of it again."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvferry.cache import KVCache
from kvferry.modes.base import ModeReceiver, OnToken, Sender, Shelf, check_question
from kvferry.modes.faults import ProtocolError
from kvferry.modes.holdings import Holdings
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.models import VLM, Continuation
    from kvferry.summary import Summary

DIGEST_BYTES = 32


@dataclass(frozen=True)
class Turn:
    """A question, and the token ids of what the model said to it."""

    question: str
    said: tuple[int, ...]


class TurnSender:
    """The edge's half of one turn. Without anything to go on from, the cloud gets the first request and all turns.

    Parameters
    ----------
    first : Sender
        That of the first question. It is asked for its bytes again where the cloud has lost the conversation.
    mode : str
        Its name.
    turns : sequence of Turn
        Those before this one.
    before : bytes
        The digest by which the cloud may hold the conversation so far; empty in the first turn.
    """

    def __init__(
        self, first: Sender, mode: str, turns: Sequence[Turn], question: str, before: bytes, holdings: Holdings
    ) -> None:
        check_question(question)
        self.digest = secrets.token_bytes(DIGEST_BYTES)
        self._first = first
        self._mode = f"MODE_{mode.upper()}"
        self._turns = turns
        self._question = question
        self._before = before
        self._holdings = holdings

    @property
    def bf16_bytes(self) -> int | None:
        """See :class:`Sender`."""
        return self._first.bf16_bytes

    @property
    def kept(self) -> Summary | None:
        """See :class:`Sender`."""
        return self._first.kept

    @property
    def prefill_seconds(self) -> float:
        """See :class:`Sender`; the first turn's work is not done again."""
        return 0.0 if self._turns else self._first.prefill_seconds

    @property
    def encode_seconds(self) -> float:
        """See :class:`Sender`; the first turn's work is not done again."""
        return 0.0 if self._turns else self._first.encode_seconds

    def start(self) -> pb.AskRequest.Start:
        """See :class:`Sender`."""
        handle = self._handle
        start = pb.AskRequest.Start(mode=self._mode) if handle else self._first.start()
        start.session, start.hold = self._holdings.session, self._holdings.hold
        start.conversation.digest, start.conversation.handle = self.digest, handle
        if handle:
            start.conversation.turns.add(question=self._question)
            return start
        asked = [*(turn.question for turn in self._turns[1:]), self._question]
        for turn, question in zip(self._turns, asked, strict=False):
            start.conversation.turns.add(answer=turn.said, question=question)
        return start

    def prepare(self) -> None:
        """See :class:`Sender`."""
        if not self._handle:
            self._first.prepare()

    def chunks(self) -> Iterator[bytes]:
        """See :class:`Sender`."""
        return iter(()) if self._handle else self._first.chunks()

    @property
    def _handle(self) -> int:
        """Of the conversation so far; 0 where the cloud is not known to hold it."""
        return self._holdings.handle(self._before)


class TurnReceiver:
    """The cloud's half of one turn.

    Parameters
    ----------
    first : ModeReceiver or None
        That of the first question; None where the session holds the conversation.

    Raises
    ------
    NotHeldError
        The session does not hold it.
    """

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, shelf: Shelf, first: ModeReceiver | None) -> None:
        talk = start.conversation
        if len(talk.digest) != DIGEST_BYTES:
            raise ProtocolError(f"a conversation is named by {DIGEST_BYTES} bytes; update the edge")
        if first is None and (len(talk.turns) != 1 or talk.turns[0].answer or start.items):
            raise ProtocolError("one question goes on from a held conversation, and nothing else; update the edge")
        for turn in talk.turns:
            check_question(turn.question)
        self._vlm = vlm
        self._talk = talk
        self._shelf = shelf
        self._first = first
        self._held = shelf.take(talk.handle, KVCache) if first is None else None
        self._seconds = 0.0

    @property
    def prefill_seconds(self) -> float:
        """See :class:`kvferry.modes.base.Receiver`: with the reading of old answers."""
        return self._seconds

    def feed(self, data: bytes) -> None:
        """See :class:`kvferry.modes.base.Receiver`."""
        if self._first is None:
            raise ProtocolError("bytes for a conversation that the session holds already; update the edge")
        self._first.feed(data)

    def finish(self) -> None:
        """See :class:`kvferry.modes.base.Receiver`."""
        if self._first is not None:
            self._first.finish()

    def settle(self) -> float:
        """See :class:`kvferry.modes.base.Receiver`."""
        return 1.0 if self._first is None else self._first.settle()

    def answer(self, max_new_tokens: int, on_token: OnToken) -> Continuation:
        """See :class:`kvferry.modes.base.Receiver`; what it leaves takes the place of the conversation so far."""
        began = time.perf_counter()
        cache, question = self._so_far()
        self._seconds = time.perf_counter() - began
        done = self._vlm.resume(cache, question, max_new_tokens=max_new_tokens, on_token=on_token, keep=True)
        if done.cache is not None:
            self._shelf.drop(self._talk.handle)
            self._shelf.put(self._talk.digest, done.cache, done.cache.nbytes)
        return done

    def _so_far(self) -> tuple[KVCache, str | None]:
        """The cache to answer from, and the question where the cache does not hold it."""
        if self._held is not None:
            return self._held, self._talk.turns[0].question
        assert self._first is not None
        cache, question = self._first.ground()
        for turn in self._talk.turns:
            cache, question = self._vlm.recall(cache, turn.answer, question), turn.question
        return cache, question
