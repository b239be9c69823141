"""A table whose full cache answers nothing rightly says nothing of compression: what it said, and what helps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from kvferry.errors import InputError
from kvferry.evaluate.plan import CEILING
from kvferry.evaluate.tasks.own import OWN

if TYPE_CHECKING:
    from kvferry.evaluate.evaluation import Asked
    from kvferry.evaluate.records import Line, Protocol
    from kvferry.evaluate.sweep import Sweep
    from kvferry.evaluate.tasks import Task

SHOWN = 3
"""Answers that an error quotes."""
LONG = 60
"""Characters of each."""
Shown = tuple[str, Sequence[str]]
"""What was said, and what would have been right."""


def check_answers(task: Task, lines: Sequence[Asked], protocol: Protocol) -> None:
    """Refuse results of a benchmark, or of questions of one's own, whose full cache scores 0.

    Raises
    ------
    InputError
        With its first answers beside the references.
    """
    mine = [x for x in lines if x.protocol == protocol and x.outcomes]
    scores = [x.outcomes[CEILING].score for x in mine]
    if not mine or not task.metric.higher_is_better or any(score is None or score > 0 for score in scores):
        return
    said = [(x.outcomes[CEILING].said, x.references) for x in mine]
    own = "--instruction 'Answer with one word.', --metric contains or f1, or " if task.name == OWN else ""
    raise InputError(
        f"{_none(len(mine), protocol)} {_quoted(said)} Try {own}longer answers than --max-new-tokens "
        f"{task.max_new_tokens}, or another model"
    )


def check_drawn(sweep: Sweep, lines: Sequence[Line], protocol: Protocol) -> None:
    """The same for the testbed's questions, of whose answers a sweep keeps only whether they are right.

    Where none is, the model is loaded once more to see what it says.

    Raises
    ------
    InputError
        As :func:`check_answers`.
    """
    mine = [x for x in lines if x.protocol == protocol]
    right = [x.outcomes[row][0] for x in mine for row in x.outcomes if row.startswith(CEILING)]
    if not right or any(right):
        return
    raise InputError(
        f"{_none(len(mine), protocol)} {_quoted(_drawn(sweep))} Drawn scenes want one short word: take a model that "
        "gives one (--model), or ask questions of your own (--data)"
    )


def _drawn(sweep: Sweep) -> Iterable[Shown]:
    from kvferry.models import load
    from kvferry.testbed import samples

    vlm = load(sweep.model, device=sweep.device or None, dtype=sweep.dtype)
    for sample in samples(sweep.split, SHOWN, start=sweep.start, kinds=sweep.kinds or None):
        cache = vlm.prefill(sample.images, sample.question).cache
        yield vlm.answer(cache, max_new_tokens=sweep.max_new_tokens), (sample.answer,)


def _none(n: int, protocol: Protocol) -> str:
    asked = "the only question" if n == 1 else f"none of {n:,} questions"
    says = "does not answer" if n == 1 else "answers"
    return f"the full cache {says} {asked} rightly (protocol {protocol}), so there is no accuracy to keep."


def _quoted(said: Iterable[Shown]) -> str:
    quotes = [f"{_short(text)} (right: {_short(*references[:1])})" for text, references in islice(said, SHOWN)]
    return f"It says {', '.join(quotes)}."


def _short(text: str = "") -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= LONG else f"{text[:LONG]}...")
