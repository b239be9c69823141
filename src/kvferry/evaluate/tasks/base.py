"""What a task is: where its rows are, and what a row asks."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from kvferry.data.questions import answer_text
from kvferry.errors import InputError
from kvferry.evaluate.metrics import Metric
from kvferry.evaluate.records import Protocol
from kvferry.pictures import open_picture

Row = Mapping[str, Any]

SHORT = "Answer the question using a single word or phrase."
"""What lmms-eval tells a model too where a short answer is wanted."""


class Hub(NamedTuple):
    """A data set on the Hugging Face Hub."""

    id: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Example:
    """One question, the same for every row of a table.

    Parameters
    ----------
    images : tuple of PIL images
    question : str
        With what the model is told about the form of the answer.
    references : tuple of str
        Accepted answers.
    context : str, optional
        Text that stands before the question.
    kind : str
        Of question, as the data set sorts them.
    group : str
        Questions of one group share a picture or a text; see :class:`kvferry.evaluate.metrics.Answers`.
    prefix, continuation : tuple of int
        Instead of all that: tokens to be read, and those whose likelihood is scored.
    key : str
        A digest of what is asked; by default of the words.
    """

    images: tuple[Image.Image, ...] = ()
    question: str = ""
    references: tuple[str, ...] = ()
    context: str | None = None
    kind: str = ""
    group: str = ""
    prefix: tuple[int, ...] = ()
    continuation: tuple[int, ...] = ()
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            words = repr((self.question, self.context, self.references, self.prefix, self.continuation)).encode()
            object.__setattr__(self, "key", hashlib.sha256(words).hexdigest()[:12])


@dataclass(frozen=True)
class Task(ABC):
    """A benchmark. One per file; its fields are those of the data set on the Hub."""

    name: ClassVar[str]
    hub: ClassVar[Hub | None] = None
    columns: ClassVar[tuple[str, ...]] = ()
    visual: bool = True
    """Whether there are pictures: the floor of a table is then the cache without visual tokens, else no context."""
    protocols: ClassVar[tuple[Protocol, ...]] = ("A", "B")
    proxy: str = "What is shown in this picture?"
    """Stands in for the unknown question in protocol B. Fixed in advance, never chosen by its score."""
    max_new_tokens: int = 16
    agreement: bool = False
    """Whether rows have no accepted answers, so that the full cache's own counts."""

    @property
    @abstractmethod
    def metric(self) -> Metric:
        """How answers are judged."""

    def rows(self, source: Iterable[Row], split: str, tokenizer: Any) -> Iterator[Row]:
        """One row per question from those of the data set."""
        yield from source

    @abstractmethod
    def read(self, row: Row) -> Example:
        """What a row asks."""


def picture(value: Any) -> Image.Image:
    """A picture as data sets hold it: PIL, a path, bytes, or ``{"bytes": ..., "path": ...}``.

    Raises
    ------
    InputError
        None of these, or no picture.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | Path) and not Path(value).is_file():
        raise InputError(f"there is no picture at {value}; paths in a data file are relative to the file")
    if not isinstance(value, Image.Image | str | Path | bytes):
        raise InputError(f"a {type(value).__name__} is not a picture; a data file holds paths, or bytes in parquet")
    return open_picture(value, "" if isinstance(value, str | Path) else "a picture of the data")


def first(values: Any) -> str:
    """The first of a list of texts, one text by itself, or nothing."""
    return str(next(iter(_listed(values)), ""))


def accepted(values: Any, *, none: bool = False) -> tuple[str, ...]:
    """Accepted answers as data sets hold them: a text, a number, ``{"answer": ...}``, or a list of such.

    One text is one answer, never its letters.

    Parameters
    ----------
    none : bool
        There may be none.

    Raises
    ------
    InputError
        There is none, or it is something else.
    """
    found = [x.get("answer") if isinstance(x, Mapping) else x for x in _listed(values)]
    texts = tuple(x if isinstance(x, str) else answer_text(x) for x in found)  # among ten people's, one may be empty
    if not any(text.strip() for text in texts) and not none:
        raise InputError("a row without an accepted answer cannot be scored; test splits often have none (--split)")
    return texts


def _listed(values: Any) -> list[Any]:
    if values is None:
        return []
    return [values] if isinstance(values, str | bytes | int | float | Mapping) else list(values)
