"""COCO captions (X. Chen et al., arXiv 1504.00325)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import CIDEr, Metric
from kvferry.evaluate.tasks.base import Example, Hub, Row, Task, accepted, picture


@dataclass(frozen=True)
class COCO(Task):
    """A sentence about a photograph, held against five people's."""

    name: ClassVar[str] = "coco"
    hub: ClassVar[Hub] = Hub("lmms-lab/COCO-Caption", None, "val")
    columns: ClassVar[tuple[str, ...]] = ("image", "answer")
    max_new_tokens: int = 64

    @property
    def metric(self) -> Metric:
        """CIDEr."""
        return CIDEr()

    def read(self, row: Row) -> Example:
        """``answer`` holds the captions."""
        question = "Provide a one-sentence caption for the provided image."
        return Example((picture(row["image"]),), question, accepted(row["answer"]))
