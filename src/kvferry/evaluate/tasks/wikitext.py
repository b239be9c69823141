"""Perplexity on WikiText-2 (S. Merity et al., arXiv 1609.07843)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from kvferry.errors import InputError
from kvferry.evaluate.metrics import Metric, Perplexity
from kvferry.evaluate.records import Protocol
from kvferry.evaluate.tasks.base import Example, Hub, Row, Task


@dataclass(frozen=True)
class WikiText(Task):
    """How likely a text goes on as it does, on top of a compressed cache of what stands before.

    The lines of the data set are joined with two line feeds and tokenised at once, without a chat template. The tokens
    are cut into windows that do not overlap, each of ``prefix`` and ``continuation`` tokens; an incomplete one at the
    end is left out. Where the tokenizer puts a special token before a text, it stands before every window too. The
    prefix is prefilled and its cache, all of it but the last token, is compressed, written, read and decoded. Then the
    prefix's last token and the continuation are fed in one pass. The score is the mean negative log-likelihood of the
    continuation's tokens; perplexity is the exponential of the mean score. What a scorer takes for the question is the
    prefix's last 32 tokens. The floor is a prefix of the last two tokens only.

    Parameters
    ----------
    prefix, continuation : int
        Tokens.
    """

    prefix: int = 1024
    continuation: int = 256
    name: ClassVar[str] = "wikitext"
    hub: ClassVar[Hub] = Hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    columns: ClassVar[tuple[str, ...]] = ("text",)
    visual: bool = False
    protocols: ClassVar[tuple[Protocol, ...]] = ("B",)

    @property
    def metric(self) -> Metric:
        """Perplexity."""
        return Perplexity()

    def rows(self, source: Iterable[Row], split: str, tokenizer: Any) -> Iterator[Row]:
        """The windows."""
        text = "\n\n".join(str(row["text"]) for row in source)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        word = tokenizer("a", add_special_tokens=False)["input_ids"]
        marked = tokenizer("a")["input_ids"]
        before = marked[: marked.index(word[0])]
        size = self.prefix + self.continuation
        if len(ids) < size:
            raise InputError(f"the text has {len(ids)} tokens, a window {size}; give more text")
        for start in range(0, len(ids) - size + 1, size):
            middle = start + self.prefix
            yield {"prefix": [*before, *ids[start:middle]], "continuation": ids[middle : start + size]}

    def read(self, row: Row) -> Example:
        """A window."""
        return Example(prefix=tuple(row["prefix"]), continuation=tuple(row["continuation"]))
