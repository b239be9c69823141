"""InfographicVQA (M. Mathew et al., arXiv 2104.12756)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import ANLS, Metric
from kvferry.evaluate.tasks.base import SHORT, Example, Hub, Row, Task, accepted, first, picture


@dataclass(frozen=True)
class InfoVQA(Task):
    """Questions on infographics."""

    name: ClassVar[str] = "infovqa"
    hub: ClassVar[Hub] = Hub("lmms-lab/DocVQA", "InfographicVQA", "validation")
    columns: ClassVar[tuple[str, ...]] = ("image", "image_url", "question", "answers", "answer_type")
    proxy: str = "What does this infographic say?"
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
            kind=first(row["answer_type"]),
            group=str(row["image_url"]),
        )
