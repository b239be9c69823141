"""Turns of a conversation, whatever the mode: the cloud keeps what the last answer left, or is told all of it again."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvferry.cache import KVCache
from kvferry.modes.base import OnToken, Sender, SessionStore
from kvferry.modes.checks import check_question, check_turns
from kvferry.modes.holdings import Holdings
from kvferry.modes.receiver import ModeReceiver
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import ProtocolError

if TYPE_CHECKING:
    from kvferry.models import VLM, Continuation
    from kvferry.models.steps import Pace, Steps
    from kvferry.summary import Summary

DIGEST_BYTES = 32


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Parameters
    ----------
    said : tuple of int
        The answer's token ids, by the tokenizer of the model that gave it.
    text : str
    here : bool
        It was given by the edge's own model, and so is told to the cloud in words.
    """

    question: str
    said: tuple[int, ...]
    text: str
    here: bool = False


@dataclass(frozen=True)
class Told:
    """What the cloud has of a conversation.

    Parameters
    ----------
    digest : bytes
        By which it may hold the cache that its last answer left; empty before its first one.
    turns : int
        How many are in that cache.
    part_bytes : int
        So many of the first request's bytes it answered from, where these were not all; else 0.
    share : float
        Of the first request's tokens; see :class:`kvferry.edge.Answer`.
    """

    digest: bytes = b""
    turns: int = 0
    part_bytes: int = 0
    share: float = 1.0


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
    told : Told
        What of that the cloud may hold.
    """

    def __init__(
        self, first: Sender, mode: str, turns: Sequence[Turn], question: str, told: Told, holdings: Holdings
    ) -> None:
        check_question(question)
        self.digest = secrets.token_bytes(DIGEST_BYTES)
        self._first = first
        self._mode = f"MODE_{mode.upper()}"
        self._turns = turns
        self._question = question
        self._told = told
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
        return 0.0 if self._told.turns else self._first.prefill_seconds

    @property
    def encode_seconds(self) -> float:
        """See :class:`Sender`; the first turn's work is not done again."""
        return 0.0 if self._told.turns else self._first.encode_seconds

    def start(self) -> pb.AskRequest.Start:
        """See :class:`Sender`."""
        handle = self._handle
        start = pb.AskRequest.Start(mode=self._mode) if handle else self._first.start()
        start.session, start.hold = self._holdings.session, self._holdings.hold
        talk = start.conversation
        talk.digest, talk.handle, talk.part = self.digest, handle, bool(self._told.part_bytes and not handle)
        since = self._turns[self._told.turns :] if handle else self._turns
        asked = [*(turn.question for turn in since), self._question]
        if handle:
            talk.turns.add(question=asked[0])
        for turn, question in zip(since, asked[1:], strict=True):
            if turn.here:
                talk.turns.add(text=turn.text, question=question)
            else:
                talk.turns.add(answer=turn.said, question=question)
        return start

    def prepare(self) -> None:
        """See :class:`Sender`."""
        if not self._handle:
            self._first.prepare()

    def chunks(self) -> Iterator[bytes]:
        """See :class:`Sender`."""
        if self._handle:
            return
        left = self._told.part_bytes or sys.maxsize
        for chunk in self._first.chunks():
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return

    def after(self, bytes_taken: int, share: float) -> Told:
        """What the cloud has after an answer that it gave from so many bytes, a share of the cache if that is less
        than 1."""
        so_far = replace(self._told, digest=self.digest, turns=len(self._turns) + 1)
        return replace(so_far, part_bytes=bytes_taken, share=share) if 0 < share < 1 else so_far

    @property
    def _handle(self) -> int:
        """Of the conversation so far; 0 where the cloud is not known to hold it."""
        return self._holdings.handle(self._told.digest)


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

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, store: SessionStore, first: ModeReceiver | None) -> None:
        talk = start.conversation
        if len(talk.digest) != DIGEST_BYTES:
            raise ProtocolError(f"a conversation is named by {DIGEST_BYTES} bytes; update the edge")
        if first is None and (not talk.turns or talk.turns[0].answer or talk.turns[0].text or start.items):
            raise ProtocolError("a question goes on from a held conversation, and nothing else; update the edge")
        if any(turn.answer and turn.text for turn in talk.turns):
            raise ProtocolError("an answer is told by token ids or in words, not both; update the edge")
        check_turns(talk.turns, vlm.bounds.longest)
        for turn in talk.turns:
            check_question(turn.question, vlm.bounds.longest)
            if turn.answer:
                vlm.check_said(turn.answer)
        self._vlm = vlm
        self._talk = talk
        self._store = store
        self._first = first
        self._held = store.take(talk.handle, KVCache) if first is None else None
        self._seconds = 0.0

    @property
    def note(self) -> str:
        """See :class:`kvferry.modes.base.Receiver`."""
        return "" if self._first is None else self._first.note

    @property
    def bf16_bytes(self) -> int:
        """See :class:`kvferry.modes.base.Receiver`."""
        return 0 if self._first is None else self._first.bf16_bytes

    @property
    def prefill_seconds(self) -> float:
        """See :class:`kvferry.modes.base.Receiver`: with the reading of old answers."""
        return self._seconds

    @property
    def reads(self) -> int:
        """See :class:`kvferry.modes.base.Receiver`: what old answers have, and the first prompt."""
        return sum(len(turn.answer) for turn in self._talk.turns) + (0 if self._first is None else self._first.reads)

    def feed(self, data: bytes) -> None:
        """See :class:`kvferry.modes.base.Receiver`."""
        if self._first is None:
            raise ProtocolError("bytes for a conversation that the session holds already; update the edge")
        self._first.feed(data)

    def finish(self) -> None:
        """See :class:`kvferry.modes.base.Receiver`."""
        if self._first is not None and self._talk.part:
            self._first.settle()
        elif self._first is not None:
            self._first.finish()

    def settle(self) -> float:
        """See :class:`kvferry.modes.base.Receiver`."""
        return 1.0 if self._first is None else self._first.settle()

    def grounding(self, pace: Pace) -> Steps[tuple[KVCache, str | None]]:
        """See :class:`ModeReceiver`: the cache to answer from, and the question where the cache does not hold it."""
        from kvferry.models.steps import brought_up

        began = time.perf_counter()
        turns = self._talk.turns
        said = [self._vlm.answer_ids(turn.text) if turn.text else list(turn.answer) for turn in turns]
        asked = [turn.question for turn in turns]
        if self._held is not None:
            so_far = yield from brought_up(self._vlm, self._held, asked[0], said[1:], asked[1:], pace)
        else:
            assert self._first is not None
            first = yield from self._first.grounding(pace)
            so_far = yield from brought_up(self._vlm, *first, said, asked, pace)
        self._seconds = time.perf_counter() - began
        return so_far

    keeps = True

    def ended(self, done: Continuation) -> None:
        """What the answer leaves takes the place of the conversation so far."""
        if done.cache is not None:
            self._store.drop(self._talk.handle)
            self._store.put(self._talk.digest, done.cache, done.cache.nbytes)

    def answer(self, max_new_tokens: int, on_token: OnToken) -> Continuation:
        """See :class:`kvferry.modes.base.Receiver`."""
        from kvferry.models.steps import Pace, finished

        cache, question = finished(self.grounding(Pace()))
        done = self._vlm.resume(cache, question, max_new_tokens=max_new_tokens, on_token=on_token, keep=True)
        self.ended(done)
        return done


def brought_up(
    vlm: VLM, cache: KVCache, question: str | None, said: Iterable[Sequence[int]], asked: Iterable[str]
) -> tuple[KVCache, str | None]:
    """A cache with what was said on top of it, and the question that is to be answered.

    Parameters
    ----------
    question : str or None
        The first one, where ``cache`` does not hold it.
    said, asked
        Each answer's token ids, and the question that followed.
    """
    from kvferry.models import steps

    return steps.finished(steps.brought_up(vlm, cache, question, said, asked, steps.Pace()))
