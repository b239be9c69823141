"""Several questions about the same pictures, each with what was said before in context."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvferry.edge.answer import Answer, Seconds, check_answer_by, checked_deadline
from kvferry.edge.call import Crossing, OnSent
from kvferry.edge.line import Line
from kvferry.errors import DeadlineError, InputError, LinkError
from kvferry.modes import (
    LocalMode,
    Mode,
    OnToken,
    ProtocolError,
    Question,
    Sender,
    Told,
    Turn,
    TurnSender,
    answer_here,
    brought_up,
)
from kvferry.modes.checks import check_question

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM


@dataclass(frozen=True)
class Opened:
    """A question and how it is to be answered.

    Parameters
    ----------
    sender : Sender or None
        The edge's half of the mode; None where the mode is ``local``.
    why, why_local : str
        See :class:`Answer`.
    or_here : bool
        The edge's own model may answer where the cloud cannot.
    answer_by : float or None
        Seconds after which the cloud is to answer from what it has.
    """

    asked: Question
    mode: Mode | LocalMode
    sender: Sender | None
    why: str
    why_local: str
    or_here: bool
    answer_by: float | None = None


Open = Callable[[Sequence[Any], str, float, float, bool], Opened]
"""From the pictures, the first question, when this turn was asked, the seconds it may take, and whether the cloud may
be told to answer it from parts."""


@dataclass(frozen=True)
class _State:
    """What a conversation goes on from, about one set of pictures.

    Parameters
    ----------
    told : Told
        What the cloud has of it.
    here : KVCache or None
        The edge's own cache, with the first ``here_turns`` turns.
    """

    pictures: Sequence[Any]
    opened: Opened
    told: Told = field(default_factory=Told)
    here: KVCache | None = None
    here_turns: int = 0


class Conversation:
    """What :meth:`kvferry.Edge.conversation` begins.

    The cloud keeps the cache that an answer leaves, so that a further question crosses alone. This object keeps what is
    needed to tell a cloud that has lost it everything again: what the first question sent, and every question and
    answer since. Such a cloud feeds the old answers token by token, as they were made, and so goes on from the same
    cache. On an edge with ``hold=False`` every turn does that.

    One question at a time. A turn that fails changes nothing; its question can be asked again.
    """

    def __init__(self, line: Line, vlm: VLM | None, deadline: float, open_: Open, pictures: Sequence[Any]) -> None:
        self._line = line
        self._vlm = vlm
        self._deadline = deadline
        self._open = open_
        self._pictures = pictures
        self._state: _State | None = None
        self._turns: list[Turn] = []

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was asked and said so far."""
        return tuple(self._turns)

    def ask(
        self,
        question: str,
        *,
        images: Sequence[Any] | Any = (),
        max_new_tokens: int = 16,
        deadline: float | None = None,
        answer_by: float | None = None,
        on_token: OnToken | None = None,
        on_sent: OnSent | None = None,
    ) -> Answer:
        """Ask the next question; see :meth:`kvferry.Edge.ask` for what these mean and what is raised.

        Parameters
        ----------
        images : path, PIL image or array, or a list of them
            Join the pictures at the beginning of the conversation, behind those that are there. The first question is
            sent anew with all of them, and the answers since are read again on top; they stay as they were given.
        answer_by : float, optional
            Counts where something is sent of the pictures: in the first turn, where a picture joins, and where the
            cloud has lost the conversation. All turns go on from the part of the cache that the cloud took in.

        Returns
        -------
        Answer
            Of this turn alone; ``kept``, ``bf16_bytes`` and ``share`` are those of the cache that all turns go on from.
        """
        began = time.perf_counter()
        seconds = self._deadline if deadline is None else checked_deadline(deadline)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is at least 1, not {max_new_tokens}")
        check_answer_by(answer_by, seconds)
        line, before = self._line, self._line.carried
        with line.asking():
            state = self._begun(images, question, began, seconds, in_parts=answer_by is None)
            opened, fresh = state.opened, state is not self._state
            if opened.sender is None or isinstance(opened.mode, LocalMode):
                why = opened.why_local if fresh else ""
                return self._answer_here(state, question, max_new_tokens, on_token, began, why)
            sender = TurnSender(opened.sender, opened.mode.NAME, self._turns, question, state.told, line.holdings)
            crossing = Crossing(
                sender, max_new_tokens, on_token, on_sent, began, seconds, False,
                opened.answer_by if fresh and answer_by is None else answer_by, line.pacer, line.rtt_seconds,
            )  # fmt: skip
            crossing.patient = not opened.or_here
            try:
                answer = line.cross(crossing, opened.mode, before)
            except (DeadlineError, ProtocolError):
                raise
            except LinkError as error:
                if not opened.or_here or crossing.first_token_at:
                    raise
                return self._answer_here(state, question, max_new_tokens, on_token, began, str(error))
        told = sender.after(crossing.bytes_taken, answer.share)
        self._state = replace(state, told=told)
        self._turns.append(Turn(question, crossing.said, answer.text))
        return replace(answer, why=opened.why, share=told.share)

    def _begun(
        self, images: Sequence[Any] | Any, question: str, began: float, seconds: float, in_parts: bool
    ) -> _State:
        """The state to go on from; a new one at the first turn and where a picture joins."""
        joining = images if isinstance(images, list | tuple) else [images]
        if self._state is not None and not joining:
            return self._state
        pictures = [*(self._pictures if self._state is None else self._state.pictures), *joining]
        first = self._turns[0].question if self._turns else question
        return _State(pictures, self._open(pictures, first, began, seconds, in_parts))

    def _answer_here(
        self, state: _State, question: str, max_new_tokens: int, on_token: OnToken | None, began: float, why: str
    ) -> Answer:
        """The edge's own model answers, and keeps the cache that its answer leaves."""
        late = time.perf_counter() - began
        vlm, prefill = self._vlm, 0.0
        if vlm is None or not self._turns:
            done, prefill = answer_here(vlm, state.opened.asked, max_new_tokens, on_token, keep=True)
        else:
            check_question(question)
            reading = time.perf_counter()
            cache = state.here or vlm.prefill(state.opened.asked.images, self._turns[0].question).cache
            since = self._turns[state.here_turns :]
            said = [turn.said if turn.here else vlm.answer_ids(turn.text) for turn in since]
            asked = [*(turn.question for turn in since), question]
            first = None if state.here is None else asked[0]
            cache, last = brought_up(vlm, cache, first, said, asked[1:])
            prefill = time.perf_counter() - reading
            done = vlm.resume(cache, last, max_new_tokens=max_new_tokens, on_token=on_token, keep=True)
        self._turns.append(Turn(question, done.token_ids, done.text, here=True))
        self._state = replace(state, here=done.cache, here_turns=len(self._turns))
        total = time.perf_counter() - began
        spent = Seconds(prefill=prefill, first_token=late + prefill + done.first_token_seconds, total=total)
        answer = Answer(done.text, "local", "", len(done.token_ids), seconds=spent, why_local=why)
        return replace(answer, why=state.opened.why)
