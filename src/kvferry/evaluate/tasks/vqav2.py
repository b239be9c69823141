"""VQAv2 (Y. Goyal et al., arXiv 1612.00837)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import Metric, SoftAccuracy
from kvferry.evaluate.tasks.base import SHORT, Example, Hub, Row, Task, accepted, picture


@dataclass(frozen=True)
class VQAv2(Task):
    """Ten people's answers to each question on a photograph."""

    name: ClassVar[str] = "vqav2"
    hub: ClassVar[Hub] = Hub("lmms-lab/VQAv2", None, "validation")
    columns: ClassVar[tuple[str, ...]] = ("image", "image_id", "question", "answers", "answer_type")

    @property
    def metric(self) -> Metric:
        """Soft accuracy."""
        return SoftAccuracy()

    def read(self, row: Row) -> Example:
        """``answers`` holds ``{"answer": ...}`` of each person, or the text."""
        return Example(
            (picture(row["image"]),),
            f"{row['question']}\n{SHORT}",
            accepted(row["answers"]),
            kind=str(row["answer_type"]),
            group=str(row["image_id"]),
        )
