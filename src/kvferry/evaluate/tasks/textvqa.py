"""TextVQA (A. Singh et al., arXiv 1904.08920)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import Metric, SoftAccuracy
from kvferry.evaluate.tasks.base import SHORT, Example, Hub, Row, Task, accepted, picture


@dataclass(frozen=True)
class TextVQA(Task):
    """Ten people's answers to questions about text in photographs; no text read by OCR is given."""

    name: ClassVar[str] = "textvqa"
    hub: ClassVar[Hub] = Hub("lmms-lab/textvqa", None, "validation")
    columns: ClassVar[tuple[str, ...]] = ("image", "image_id", "question", "answers")

    @property
    def metric(self) -> Metric:
        """Soft accuracy."""
        return SoftAccuracy(possessives=True)

    def read(self, row: Row) -> Example:
        """``answers`` holds ten texts."""
        question = f"{str(row['question']).capitalize()}\n{SHORT}"
        answers = accepted(row["answers"])
        return Example((picture(row["image"]),), question, answers, group=str(row["image_id"]))
