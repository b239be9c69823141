"""Where pictures and questions come from: a file of one's own, or the testbed's drawn scenes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kvferry.errors import InputError


@dataclass(frozen=True)
class Asked:
    """One question.

    Parameters
    ----------
    name : str
        Where it comes from, for people.
    images : tuple of PIL images or paths
        May be empty.
    needs_image : bool or None
        Whether the picture decides the answer; None where nobody says.
    answer : str or None
        The true one; None where nobody says.
    """

    name: str
    images: tuple[Any, ...]
    question: str
    needs_image: bool | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Questions:
    """``total`` questions; ``each()`` goes through them lazily, as often as it is called."""

    label: str
    total: int
    each: Callable[[], Iterator[Asked]]


def drawn_questions(split: str, n: int) -> Questions:
    """The first ``n`` questions of a split of the testbed, where ``lookup`` questions need no picture."""
    from kvferry.testbed.data import SPLITS, samples

    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")

    def each() -> Iterator[Asked]:
        for one in samples(split, n):
            yield Asked(f"{split} {one.index}", tuple(one.images), one.question, one.kind != "lookup", one.answer)

    return Questions(f"{n} {split} questions of the testbed", n, each)


def questions_from(file: Path, folder: Path | None = None, n: int | None = None) -> Questions:
    """Questions in JSON lines; every line is checked before the first is asked.

    A line is an object with ``question`` (str) and, all optional, ``image`` (str) or ``images`` (list of str), file
    names in ``folder`` (by default the file's own), ``needs_image`` (bool: false where the text alone answers) and
    ``answer`` (str).

    Raises
    ------
    InputError
        With the number of the line that cannot be used.
    """
    folder = file.parent if folder is None else folder
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; pass the folder that holds the pictures")
    total = sum(1 for _ in islice(_lines(file, folder), n))
    if not total:
        raise InputError(f'{file} holds no questions; write lines such as {{"image": "a.png", "question": "..."}}')
    return Questions(f"{total} questions of {file.name}", total, lambda: islice(_lines(file, folder), n))


def _lines(file: Path, folder: Path) -> Iterator[Asked]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _asked(line, f"{file.name}, line {number}", folder)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read {file}: {reason}; give a file of JSON lines") from None


def _asked(line: str, name: str, folder: Path) -> Asked:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON ({error.msg}); write one object a line") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("question"), str) or not entry["question"].strip():
        raise InputError(f'{name} has no question; write {{"image": "a.png", "question": "..."}}')
    names = entry.get("images", [entry["image"]] if "image" in entry else [])
    if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
        raise InputError(f'{name}: "images" is a list of file names, "image" one file name')
    needs = entry.get("needs_image")
    if needs is not None and not isinstance(needs, bool):
        raise InputError(f'{name}: "needs_image" is true or false')
    answer = entry.get("answer")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise InputError(f'{name}: "answer" is a text that is not empty')
    paths = tuple(folder / x for x in names)
    for path in paths:
        if not path.is_file():
            raise InputError(f"{name}: there is no picture at {path}; check the name or pass its folder")
    return Asked(name, paths, entry["question"], needs, answer)
