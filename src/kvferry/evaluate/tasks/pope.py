"""POPE (Y. Li et al., arXiv 2305.10355)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import Metric, YesNo
from kvferry.evaluate.tasks.base import SHORT, Example, Hub, Row, Task, accepted, picture


@dataclass(frozen=True)
class POPE(Task):
    """Is there such a thing in the picture? Half of the time there is not."""

    name: ClassVar[str] = "pope"
    hub: ClassVar[Hub] = Hub("lmms-lab/POPE", None, "test")
    columns: ClassVar[tuple[str, ...]] = ("image", "image_source", "question", "answer", "category")

    @property
    def metric(self) -> Metric:
        """Accuracy, precision, recall, F1, yes-ratio."""
        return YesNo()

    def read(self, row: Row) -> Example:
        """``category`` is adversarial, popular or random."""
        question = f"{str(row['question']).strip()}\n{SHORT}"
        kind, group = str(row["category"]), str(row["image_source"])
        return Example((picture(row["image"]),), question, accepted(row["answer"]), kind=kind, group=group)
