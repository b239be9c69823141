"""What a row asks: pictures, a question, accepted answers. Whatever is wrong is said with its file, line and field."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from kvferry.data.files import rows_of
from kvferry.errors import InputError
from kvferry.pictures import check_picture

FIELDS = (
    "image", "images", "question", "answer", "answers", "context", "choices", "needs_image", "kind", "id",
)  # fmt: skip
_PAIRS = {"image": "images", "images": "image", "answer": "answers", "answers": "answer"}
_OTHER_NAMES = {
    "image": "img picture pictures photo photos image_path image_file image_name file_name filename image_url",
    "question": "query prompt instruction",
    "answer": "label labels reference references target targets ground_truth gold gt response solution",
    "context": "passage document paragraph",
    "choices": "options",
    "kind": "category",
    "id": "question_id qid",
}
"""What others call a field: told where the row has no such field itself."""
_MEANT = {other: field for field, others in _OTHER_NAMES.items() for other in others.split()}
EXAMPLE = '{"image": "a.png", "question": "...", "answer": "..."}'


@dataclass(frozen=True)
class Asked:
    """One question.

    Parameters
    ----------
    name : str
        Where it comes from, for people.
    images : tuple
        Whatever :func:`kvferry.pictures.open_picture` reads: PIL images, paths, or bytes of files; may be empty.
    needs_image : bool or None
        Whether the picture decides the answer; None where nobody says.
    answers : tuple of str
        All that are right; empty where nobody says.
    context : str, optional
        Text before the question.
    kind, id : str
    """

    name: str
    images: tuple[Any, ...]
    question: str
    needs_image: bool | None = None
    answers: tuple[str, ...] = ()
    context: str | None = None
    kind: str = ""
    id: str = ""

    @property
    def answer(self) -> str | None:
        """The first of the right ones."""
        return self.answers[0] if self.answers else None

    @property
    def text(self) -> str:
        """Context and question as one, the way a prompt holds them."""
        return self.question if self.context is None else f"{self.context}\n{self.question}"

    @property
    def group(self) -> str:
        """The same for questions on the same pictures and text; a digest."""
        parts = [x if isinstance(x, bytes) else str(x).encode() for x in (*self.images, self.context or "")]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


@dataclass(frozen=True)
class Questions:
    """``total`` questions; ``each()`` goes through them lazily, as often as it is called.

    Parameters
    ----------
    label : str
        What they are, for people.
    unused : tuple of str
        Fields of the file that mean nothing to us.
    having, lacking : dict of str to str
        Of the fields images, answers and context, the first question that has one, and the first that has none.
    """

    label: str
    total: int
    each: Callable[[], Iterator[Asked]]
    unused: tuple[str, ...] = ()
    having: Mapping[str, str] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)


def read_questions(
    file: Path, folder: Path | None = None, n: int | None = None, start: int = 0, instruction: str = ""
) -> Questions:
    """Questions of one's own; every row that will be asked is checked before the first is.

    A row has ``question`` (text) and, all optional, ``image`` or ``images`` (one picture or a list: file names,
    relative to ``folder``, or as Hugging Face stores pictures in Parquet), ``answer`` or ``answers`` (one that is
    right, or a list: texts or numbers), ``context`` (text before the question), ``choices`` (texts, shown as A, B, ...
    below the question; the answer is one of them or its letter), ``needs_image`` (bool: false where the text alone
    answers), ``kind`` (of question) and ``id``. Other fields are named in :attr:`Questions.unused`; one that looks
    like a field misspelt is an error.

    Parameters
    ----------
    file : path
        See :func:`kvferry.data.rows_of`.
    folder : path, optional
        Of the pictures; by default the file's own.
    n, start : int
        Which rows; by default all.
    instruction : str
        A line below every question, such as "Answer in one word."

    Raises
    ------
    InputError
        With the line that cannot be used, and what to write there.
    """
    folder = file.parent if folder is None else folder
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; pass the folder that holds the pictures")
    unused: dict[str, None] = {}

    def each() -> Iterator[Asked]:
        for place, row in islice(rows_of(file), start, None if n is None else start + n):
            unused.update(dict.fromkeys(name for name in row if name not in FIELDS))
            asked = _asked(row, place, folder)
            yield replace(asked, question=f"{asked.question}\n{instruction}") if instruction else asked

    having: dict[str, str] = {}
    lacking: dict[str, str] = {}
    total = _check(each(), having, lacking)
    if not total and start:
        raise InputError(f"{file} has no row {start}; choose a smaller --start")
    if not total:
        raise InputError(f"{file} holds no questions; write lines such as {EXAMPLE}")
    return Questions(f"{total} questions of {file.name}", total, each, tuple(unused), having, lacking)


def _check(asked: Iterator[Asked], having: dict[str, str], lacking: dict[str, str]) -> int:
    """How many there are; every picture's header is read once."""
    count = 0
    seen: set[str] = set()
    names: dict[str, str] = {}
    for one in asked:
        count += 1
        for name, value in (("images", one.images), ("answers", one.answers), ("context", one.context)):
            (having if value else lacking).setdefault(name, one.name)
        if one.id and names.setdefault(one.id, one.name) != one.name:
            raise InputError(f'{one.name} has the "id" {one.id!r} of {names[one.id]}; give each its own, or none')
        for image in one.images:
            if str(image) in seen:
                continue
            try:
                check_picture(image, "" if isinstance(image, Path) else "its picture")
            except InputError as error:
                raise InputError(f"{one.name}: {error}") from None
            if isinstance(image, Path):
                seen.add(str(image))
    return count


def _asked(row: Mapping[str, Any], place: str, folder: Path) -> Asked:
    row = {name: value for name, value in row.items() if value is not None}
    _check_names(row, place)
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f'{place} has no "question"; write {EXAMPLE}')
    context, needs = row.get("context"), row.get("needs_image")
    if context is not None and not isinstance(context, str):
        raise InputError(f'{place}: "context" is a text that stands before the question')
    if isinstance(needs, str) and needs.lower() in ("true", "false"):
        needs = needs.lower() == "true"
    if needs is not None and not isinstance(needs, bool):
        raise InputError(f'{place}: "needs_image" is true or false')
    answers = _answers(row, place)
    if "choices" in row:
        question, answers = _choices(row["choices"], question, answers, place)
    named = {name: row.get(name, "") for name in ("kind", "id")}
    for name, value in named.items():
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise InputError(f'{place}: "{name}" is a text or a whole number')
    return Asked(
        place,
        _images(row, place, folder),
        question,
        needs,
        answers,
        context or None,
        str(named["kind"]),
        str(named["id"]),
    )


def _check_names(row: Mapping[str, Any], place: str) -> None:
    """Refuse two fields for one thing, and a field that looks like one of ours misspelt."""
    if "image" in row and "images" in row:
        raise InputError(f'{place} has "image" and "images"; leave one out')
    for name in row:
        if name in FIELDS or not isinstance(name, str):
            continue
        plain = name.strip().lower().replace("-", "_").replace(" ", "_")
        near = difflib.get_close_matches(plain, FIELDS, 1, 0.8) if len(plain) > 3 else []
        meant = plain if plain in FIELDS else _MEANT.get(plain) or (near[0] if near else "")
        if meant and meant not in row and _PAIRS.get(meant, meant) not in row:
            raise InputError(f'{place} has no "{meant}" but "{name}"; if that is it, call it "{meant}"')


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _images(row: Mapping[str, Any], place: str, folder: Path) -> tuple[Path | bytes, ...]:
    name = "images" if "images" in row else "image"
    found: list[Path | bytes] = []
    for value in _listed(row.get(name, [])):
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            found.append(value)
            continue
        if not isinstance(value, str) or not value.strip():
            raise InputError(f'{place}: "{name}" is a file name or a list of them; in parquet also bytes of files')
        if "://" in value or value.startswith("data:"):
            raise InputError(f'{place}: "{name}" is an address, not a file; save the picture and name its file')
        path = folder / value
        if not path.is_file():
            raise InputError(f"{place}: there is no picture at {path}; check the name or pass its folder (--images)")
        found.append(path)
    return tuple(found)


def _answers(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Those of ``answers``, and ``answer`` where it is not among them."""
    found: list[str] = []
    for name in ("answers", "answer"):
        if name not in row:
            continue
        values = [_text(value, name, place) for value in _listed(row[name])]
        if not values:
            raise InputError(f'{place}: "{name}" is an empty list; write what is right, or leave the field out')
        found += [value for value in values if name == "answers" or value not in found]
    return tuple(found)


def answer_text(value: Any) -> str:
    """An answer as a text; a number as people write it, 4.0 as 4.

    Raises
    ------
    InputError
        It is something else, or empty.
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)
    raise InputError(f"an answer is a text that is not empty, or a number, not {value!r}")


def _text(value: Any, field: str, place: str) -> str:
    try:
        return answer_text(value)
    except InputError:
        raise InputError(f'{place}: "{field}" is a text that is not empty, a number, or a list of these') from None


def _choices(value: Any, question: str, answers: tuple[str, ...], place: str) -> tuple[str, tuple[str, ...]]:
    """The question with its choices below, and each right one as letter, as text and as both."""
    if not isinstance(value, list) or not 2 <= len(value) <= 26:
        raise InputError(f'{place}: "choices" is a list of 2 to 26 texts')
    texts = [_text(x, "choices", place) for x in value]
    letters = [chr(ord("A") + i) for i in range(len(texts))]
    right: list[str] = []
    for answer in answers:
        which = texts.index(answer) if answer in texts else letters.index(answer) if answer in letters else None
        if which is None:
            raise InputError(f'{place}: the answer {answer!r} is none of "choices", and no letter of one')
        right += [letters[which], texts[which], f"{letters[which]}. {texts[which]}"]
    shown = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    return f"{question}\n{shown}", tuple(right)
