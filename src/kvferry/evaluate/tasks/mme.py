"""MME (C. Fu et al., arXiv 2306.13394)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import Metric, PairedYesNo
from kvferry.evaluate.tasks.base import SHORT, Example, Hub, Row, Task, accepted, picture

_OWN = " Please answer yes or no."


@dataclass(frozen=True)
class MME(Task):
    """Two questions on each picture, one to be answered with yes and one with no."""

    name: ClassVar[str] = "mme"
    hub: ClassVar[Hub] = Hub("lmms-lab/MME", None, "test")
    columns: ClassVar[tuple[str, ...]] = ("image", "question_id", "question", "answer", "category")

    @property
    def metric(self) -> Metric:
        """Accuracy, and that by pairs."""
        return PairedYesNo()

    def read(self, row: Row) -> Example:
        """``question_id`` names the picture; MME's own instruction gives way to the usual one, as in lmms-eval."""
        question = f"{str(row['question']).strip().replace(_OWN, '')}\n{SHORT}"
        kind, group = str(row["category"]), f"{row['category']}/{row['question_id']}"
        return Example((picture(row["image"]),), question, accepted(row["answer"]), kind=kind, group=group)
