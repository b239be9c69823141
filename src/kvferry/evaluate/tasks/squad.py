"""SQuAD v2 (P. Rajpurkar et al., arXiv 1806.03822)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import Metric, WordF1
from kvferry.evaluate.metrics.words import NO_ANSWER
from kvferry.evaluate.tasks.base import Example, Hub, Row, Task, accepted


@dataclass(frozen=True)
class SQuAD2(Task):
    """Questions on a paragraph, half of which it does not answer."""

    name: ClassVar[str] = "squad_v2"
    hub: ClassVar[Hub] = Hub("rajpurkar/squad_v2", None, "validation")
    columns: ClassVar[tuple[str, ...]] = ("context", "question", "answers")
    visual: bool = False
    proxy: str = "What is this text about?"
    max_new_tokens: int = 32

    @property
    def metric(self) -> Metric:
        """F1 and exact match."""
        return WordF1()

    def read(self, row: Row) -> Example:
        """``answers`` is ``{"text": [...], ...}`` or the list, empty where there is none."""
        given = row["answers"]["text"] if isinstance(row["answers"], Mapping) else row["answers"]
        told = f"Answer with words from the text. If it does not hold the answer, say {NO_ANSWER}."
        answers = tuple(dict.fromkeys(accepted(given, none=True)))
        context = str(row["context"])
        return Example(
            question=f"{str(row['question']).strip()}\n{told}",
            references=answers,
            context=context,
            kind="answerable" if answers else NO_ANSWER,
            group=hashlib.sha256(context.encode()).hexdigest()[:12],
        )
