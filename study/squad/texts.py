"""SQuAD's paragraphs put together to texts of a wanted length, each with questions on several of its paragraphs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvferry.errors import InputError

SEED = 20261130


@dataclass(frozen=True)
class Question:
    """One question with its accepted answers; ``paragraph`` is the place of its own among a text's paragraphs."""

    text: str
    answers: tuple[str, ...]
    paragraph: int = 0
    title: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of an article with all questions on it."""

    title: str
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Text:
    """Paragraphs that are read in one go. Whatever does not answer a question distracts from it."""

    index: int
    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def words(self) -> str:
        """The paragraphs, a line each."""
        return "\n".join(self.paragraphs)


def read_squad(file: Path) -> list[Paragraph]:
    """Paragraphs, JSON lines of ``title``, ``context`` and ``questions`` (``question``, ``answers``).

    Raises
    ------
    InputError
        There is no such file, or a line lacks something.
    """
    if not file.is_file():
        raise InputError(f"there are no paragraphs at {file}; give SQuAD's as JSON lines (--data)")
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            asked = tuple(
                Question(x["question"].strip(), tuple(x["answers"]), 0, row["title"]) for x in row["questions"]
            )
            found.append(Paragraph(row["title"], " ".join(row["context"].split()), asked))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}, line {number}: not a paragraph with title, context and questions") from None
    return found


def texts(paragraphs: Sequence[Paragraph], count: Callable[[str], int], most: int, questions: int) -> Iterator[Text]:
    """Texts of at most ``most`` tokens and not many fewer; no paragraph is in two of them but to fill one up.

    Paragraphs are taken in an order drawn once for all, so that neighbours are of different articles; where the next
    one is too long, its last sentences stand first and it begins the next text. Questions are taken from all
    paragraphs in turn.

    Parameters
    ----------
    count : callable
        Tokens of a string.
    questions : int
        Of each text, fewer where its paragraphs have fewer.
    """
    order = [paragraphs[i] for i in np.random.default_rng(SEED).permutation(len(paragraphs))]
    room, index = most, 0
    held: list[Paragraph] = []
    for paragraph in order:
        size = count(paragraph.text + "\n")
        if size > room and held:
            yield _text(index, held, _ending(paragraph.text, count, room), questions)
            room, held, index = most, [], index + 1
        if size <= room:
            held.append(paragraph)
            room -= size
    if held:
        yield _text(index, held, "", questions)


def _text(index: int, held: Sequence[Paragraph], filler: str, questions: int) -> Text:
    before = [filler] if filler else []
    taken: list[Question] = []
    rounds = max(len(p.questions) for p in held)
    for turn in range(rounds):
        for place, paragraph in enumerate(held, len(before)):
            if turn < len(paragraph.questions) and len(taken) < questions:
                asked = paragraph.questions[turn]
                taken.append(Question(asked.text, asked.answers, place, asked.title))
    return Text(index, (*before, *(p.text for p in held)), tuple(taken))


def _ending(text: str, count: Callable[[str], int], room: int) -> str:
    """As many of a text's last sentences as there is room for."""
    sentences = re.split(r"(?<=[.!?]) ", text)
    for first in range(1, len(sentences)):
        rest = " ".join(sentences[first:])
        if count(rest + "\n") <= room:
            return rest
    return ""


def sentence_of(paragraph: Paragraph, question: Question) -> str:
    """The one sentence that holds the answer; empty where none or several do."""
    found = [x for x in re.split(r"(?<=[.!?]) ", paragraph.text) if question.answers[0] in x]
    return found[0] if len(found) == 1 else ""
