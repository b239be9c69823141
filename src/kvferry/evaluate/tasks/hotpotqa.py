"""HotpotQA with distractors (Z. Yang et al., arXiv 1809.09600)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics import Metric, WordF1
from kvferry.evaluate.tasks.base import SHORT, Example, Hub, Row, Task, accepted


@dataclass(frozen=True)
class HotpotQA(Task):
    """Questions whose answer takes two of ten paragraphs."""

    name: ClassVar[str] = "hotpotqa"
    hub: ClassVar[Hub] = Hub("hotpotqa/hotpot_qa", "distractor", "validation")
    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answer", "type")
    visual: bool = False
    proxy: str = "What is this text about?"
    max_new_tokens: int = 32

    @property
    def metric(self) -> Metric:
        """F1 and exact match."""
        return WordF1()

    def read(self, row: Row) -> Example:
        """``context`` is ``{"title": [...], "sentences": [[...], ...]}``."""
        paragraphs = zip(row["context"]["title"], row["context"]["sentences"], strict=True)
        text = "\n\n".join(f"{title}\n{''.join(sentences).strip()}" for title, sentences in paragraphs)
        question = f"{row['question']}\n{SHORT}"
        return Example(question=question, references=accepted(row["answer"]), context=text, kind=str(row["type"]))
