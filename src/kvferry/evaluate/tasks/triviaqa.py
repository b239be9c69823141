"""TriviaQA, reading comprehension (M. Joshi et al., arXiv 1705.03551)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from kvferry.evaluate.metrics import Metric, WordF1
from kvferry.evaluate.tasks.base import SHORT, Example, Hub, Row, Task, accepted


@dataclass(frozen=True)
class TriviaQA(Task):
    """Quiz questions, with Wikipedia pages and web pages that may tell.

    Parameters
    ----------
    words : int
        Of the pages (Wikipedia's first, in the data set's order, one after the other) so many words are given.
    """

    words: int = 3000
    name: ClassVar[str] = "triviaqa"
    hub: ClassVar[Hub] = Hub("mandarjoshi/trivia_qa", "rc", "validation")
    columns: ClassVar[tuple[str, ...]] = ("question", "entity_pages", "search_results", "answer")
    visual: bool = False
    proxy: str = "What is this text about?"
    max_new_tokens: int = 32

    @property
    def metric(self) -> Metric:
        """F1 and exact match."""
        return WordF1()

    def read(self, row: Row) -> Example:
        """``answer`` holds ``value`` and its ``aliases``."""
        pages = chain(row["entity_pages"]["wiki_context"], row["search_results"]["search_context"])
        text = " ".join(list(chain.from_iterable(str(page).split() for page in pages))[: self.words])
        right = row["answer"] if isinstance(row["answer"], Mapping) else {"value": row["answer"]}
        answers = (*accepted(right.get("value")), *accepted(right.get("aliases"), none=True))
        references = tuple(dict.fromkeys(answers))
        return Example(question=f"{row['question']}\n{SHORT}", references=references, context=text or None)
