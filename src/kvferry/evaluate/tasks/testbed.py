"""The testbed's questions on drawn scenes; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

from kvferry.evaluate.metrics import ExactMatch, Metric
from kvferry.evaluate.tasks.base import Example, Row, Task
from kvferry.testbed import sample


@dataclass(frozen=True)
class Testbed(Task):
    """``kvferry sweep`` asks the same questions, with its own shortcuts for them."""

    __test__ = False
    name: ClassVar[str] = "testbed"
    proxy: str = "how many shapes are there?"
    max_new_tokens: int = 12

    @property
    def metric(self) -> Metric:
        """Exact match."""
        return ExactMatch()

    def rows(self, source: Iterable[Row], split: str, tokenizer: Any) -> Iterator[Row]:
        """Endless; a row is drawn where it is read."""
        return ({"split": split or "validation", "index": index} for index in count())

    def read(self, row: Row) -> Example:
        """Draw the scene."""
        drawn = sample(row["split"], row["index"])
        return Example(tuple(drawn.images), drawn.question, (drawn.answer,), kind=drawn.kind)
