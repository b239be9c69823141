"""Several questions about the same pictures, each with what was said before in context."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvferry.edge.answer import Answer, Seconds, checked_deadline
from kvferry.edge.call import Crossing, OnSent
from kvferry.edge.line import Line
from kvferry.errors import InputError
from kvferry.modes import LocalMode, Mode, OnToken, Question, Sender, Turn, TurnSender, answer_here

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


Open = Callable[[str, float, float], Opened]
"""From the first question, when it was asked, and the seconds it may take."""


class Conversation:
    """What :meth:`kvferry.Edge.conversation` begins.

    The cloud keeps the cache that an answer leaves, so that a further question crosses alone. This object keeps what is
    needed to tell a cloud that has lost it everything again: what the first question sent, and every question and
    answer since. Such a cloud feeds the old answers token by token, as they were made, and so goes on from the same
    cache. On an edge with ``hold=False`` every turn does that.

    One question at a time. A turn that fails changes nothing; its question can be asked again.
    """

    def __init__(self, line: Line, vlm: VLM | None, deadline: float, open_: Open) -> None:
        self._line = line
        self._vlm = vlm
        self._deadline = deadline
        self._open = open_
        self._opened: Opened | None = None
        self._turns: list[Turn] = []
        self._digest = b""
        self._here: KVCache | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was asked and said so far."""
        return tuple(self._turns)

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 16,
        deadline: float | None = None,
        on_token: OnToken | None = None,
        on_sent: OnSent | None = None,
    ) -> Answer:
        """Ask the next question; see :meth:`kvferry.Edge.ask` for what these mean and what is raised.

        Returns
        -------
        Answer
            Of this turn alone; ``kept`` and ``bf16_bytes`` are those of the cache that the first turn sent.
        """
        began = time.perf_counter()
        seconds = self._deadline if deadline is None else checked_deadline(deadline)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is at least 1, not {max_new_tokens}")
        with self._line.asking():
            before = self._line.carried
            opened = self._opened if self._opened and self._turns else self._open(question, began, seconds)
            if isinstance(opened.mode, LocalMode) or opened.sender is None:
                answer, said = self._answer_here(opened, question, max_new_tokens, on_token, began)
            else:
                holdings = self._line.holdings
                sender = TurnSender(opened.sender, opened.mode.NAME, self._turns, question, self._digest, holdings)
                line = self._line
                crossing = Crossing(
                    sender, max_new_tokens, on_token, on_sent, began, seconds, keep=False, pacer=line.pacer,
                    rtt_seconds=line.rtt_seconds,
                )  # fmt: skip
                answer = self._line.cross(crossing, opened.mode, before)
                said, self._digest = crossing.said, sender.digest
            self._opened = opened
            self._turns.append(Turn(question, said))
            return replace(answer, why=opened.why)

    def _answer_here(
        self, opened: Opened, question: str, max_new_tokens: int, on_token: OnToken | None, began: float
    ) -> tuple[Answer, tuple[int, ...]]:
        """The edge's own model answers, and keeps the cache that its answer leaves."""
        late = time.perf_counter() - began
        prefill = 0.0
        if self._vlm is None or self._here is None:
            done, prefill = answer_here(self._vlm, opened.asked, max_new_tokens, on_token, keep=True)
        else:
            done = self._vlm.resume(self._here, question, max_new_tokens=max_new_tokens, on_token=on_token, keep=True)
        self._here = done.cache
        total = time.perf_counter() - began
        seconds = Seconds(prefill=prefill, first_token=late + prefill + done.first_token_seconds, total=total)
        why = opened.why_local if not self._turns else ""
        return Answer(done.text, "local", "", len(done.token_ids), seconds=seconds, why_local=why), done.token_ids
