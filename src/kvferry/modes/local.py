"""``local``: the edge's own model answers, and nothing crosses the wire."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from kvferry.errors import InputError
from kvferry.modes.base import OnToken, Question
from kvferry.modes.checks import check_question

if TYPE_CHECKING:
    from kvferry.models import VLM, Continuation


@dataclass(frozen=True)
class LocalMode:
    """``local``. It has no options."""

    NAME: ClassVar[str] = "local"
    LEAVES: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def parse(cls, options: str) -> LocalMode:
        """The mode of ``local``."""
        if options:
            raise InputError(f"mode local takes no options; leave out {options!r}")
        return cls()

    @property
    def needs_model(self) -> bool:
        """Whether the edge must hold a model."""
        return True

    def __str__(self) -> str:
        return "local"


def answer_here(
    vlm: VLM | None, question: Question, max_new_tokens: int, on_token: OnToken | None, keep: bool = False
) -> tuple[Continuation, float]:
    """What the edge's model says, and the seconds its prefill took; ``keep`` is that of :meth:`VLM.resume`."""
    if vlm is None:
        raise InputError("mode local needs a model on this side; load one")
    check_question(question.text)
    began = time.perf_counter()
    prefilled = replace(question, ship_first=False).prefilled(vlm)
    seconds = time.perf_counter() - began
    done = vlm.resume(prefilled.cache, max_new_tokens=max_new_tokens, on_token=on_token, keep=keep)
    return done, seconds
