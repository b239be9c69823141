"""DocVQA (M. Mathew et al., arXiv 2007.00398)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import ANLS, Metric
from kvferry.evaluate.tasks.base import SHORT, Example, Hub, Row, Task, accepted, first, picture


@dataclass(frozen=True)
class DocVQA(Task):
    """Questions on scanned pages."""

    name: ClassVar[str] = "docvqa"
    hub: ClassVar[Hub] = Hub("lmms-lab/DocVQA", "DocVQA", "validation")
    columns: ClassVar[tuple[str, ...]] = ("image", "docId", "question", "answers", "question_types")
    proxy: str = "What does this document say?"
    max_new_tokens: int = 32

    @property
    def metric(self) -> Metric:
        """ANLS."""
        return ANLS()

    def read(self, row: Row) -> Example:
        """``answers`` holds the accepted texts."""
        return Example(
            (picture(row["image"]),),
            f"{row['question']}\n{SHORT}",
            accepted(row["answers"]),
            kind=first(row["question_types"]),
            group=str(row["docId"]),
        )
