"""ChartQA (A. Masry et al., arXiv 2203.10244)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import Metric, RelaxedAccuracy
from kvferry.evaluate.tasks.base import Example, Hub, Row, Task, accepted, picture


@dataclass(frozen=True)
class ChartQA(Task):
    """Questions on charts, written by people or by a machine."""

    name: ClassVar[str] = "chartqa"
    hub: ClassVar[Hub] = Hub("HuggingFaceM4/ChartQA", None, "test")
    columns: ClassVar[tuple[str, ...]] = ("image", "query", "label", "human_or_machine")
    proxy: str = "What does this chart show?"

    @property
    def metric(self) -> Metric:
        """Relaxed accuracy."""
        return RelaxedAccuracy()

    def read(self, row: Row) -> Example:
        """``label`` is a list of texts; ``human_or_machine`` is 0 or 1, or the word."""
        question = f"{row['query']}\nAnswer the question with a single word."
        kind = {"0": "human", "1": "machine"}.get(str(row["human_or_machine"]), str(row["human_or_machine"]))
        return Example((picture(row["image"]),), question, accepted(row["label"]), kind=kind)
