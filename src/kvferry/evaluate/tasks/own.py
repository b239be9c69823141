"""Questions of one's own: ``kvferry eval MODEL --data own.jsonl``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kvferry.data import Asked, Questions, read_questions
from kvferry.errors import InputError
from kvferry.evaluate.metrics import ExactMatch, Metric, metric_of
from kvferry.evaluate.tasks.base import Example, Row, Task
from kvferry.pictures import open_picture

OWN = "own"
LONGEST = 32
"""Tokens of an answer, unless told otherwise."""


@dataclass(frozen=True)
class Own(Task):
    """Rows hold a :class:`kvferry.data.Asked`."""

    max_new_tokens: int = LONGEST
    judge: Metric = field(default_factory=ExactMatch)
    name: ClassVar[str] = OWN

    @property
    def metric(self) -> Metric:
        """As asked for."""
        return self.judge

    def read(self, row: Row) -> Example:
        """Pictures are decoded here."""
        asked: Asked = row["asked"]
        return Example(
            tuple(open_picture(x, "" if isinstance(x, Path) else f"the picture of {asked.name}") for x in asked.images),
            asked.question,
            asked.answers,
            asked.context,
            asked.kind,
            asked.group,
            key=key_of(asked),
        )


def key_of(asked: Asked) -> str:
    """A digest of what is asked and accepted; pictures count by their names, or bytes where they have none."""
    pictures = [x if isinstance(x, bytes) else Path(x).name for x in asked.images]
    whole = repr((asked.question, asked.context, asked.answers, pictures)).encode()
    return hashlib.sha256(whole).hexdigest()[:12]


def own_task(plan: Mapping[str, Any]) -> Own:
    """The task of a plan as a results file holds it; see :class:`kvferry.evaluate.evaluation.Evaluation`."""
    visual = bool(plan["visual"])
    return Own(
        visual=visual,
        proxy=Task.proxy if visual else "What is this text about?",
        max_new_tokens=plan["max_new_tokens"] or LONGEST,
        agreement=not plan["answered"],
        judge=metric_of(plan["metric"] or "exact"),
    )


def own_questions(
    data: str, images: str, n: int | None, start: int, instruction: str, metric: str
) -> tuple[Questions, bool, bool]:
    """A file's questions, whether they have pictures, and whether they have answers.

    Raises
    ------
    InputError
        Some have and some have not, which no table could be read by; nothing that could be compressed; or an answer
        that the metric cannot use.
    """
    found = read_questions(Path(data), Path(images) if images else None, n, start, instruction)
    answered = _all_or_none(found, "answer", "answers", "an answer of every question, or of none")
    visual = _all_or_none(found, "image", "images", "pictures with every question, or with none")
    if not visual and "context" in found.lacking:
        raise InputError(
            f'{found.lacking["context"]} has no picture and no "context": nothing stands before the question that '
            "could be compressed; move the text that it is about into that field"
        )
    judge = metric_of(metric or "exact")
    if answered:
        for asked in found.each():
            try:
                judge.score("", asked.answers)
            except InputError as error:
                raise InputError(f"{asked.name}: {error}") from None
    return found, visual, answered


def _all_or_none(found: Questions, field: str, plural: str, wanted: str) -> bool:
    if plural in found.lacking and plural in found.having:
        raise InputError(
            f'{found.lacking[plural]} has no "{field}" and {found.having[plural]} has one; a table needs {wanted}'
        )
    return plural in found.having
