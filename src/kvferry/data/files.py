"""Rows of a file, one after the other: JSON lines, a JSON array, Parquet, or CSV; each with the place it stands at."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from kvferry.errors import DependencyError, InputError

ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
CHUNK = 1 << 16
"""Characters of a JSON array that are read at a time, at least; a file is never in memory as a whole."""
LONGEST_CELL = 1 << 30
_WHITE = re.compile(r"[ \t\r\n]*")
Row = tuple[str, dict[str, Any]]


def rows_of(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Every row, as ``("own.jsonl, line 3", {field: value})``.

    Text is UTF-8, with or without a byte order mark, lines end as they may, empty ones are skipped. JSON that begins
    with ``[`` is one array, else there is one object a line. In CSV and TSV the first line names the fields, an empty
    cell is an absent field, and a cell that begins with ``[`` is a JSON list. Parquet needs pyarrow.

    Parameters
    ----------
    columns : sequence of str
        Of Parquet, only these are read where it has any of them; by default all.

    Raises
    ------
    InputError
        There is no such file, or it is not what it should be; with the line.
    DependencyError
        Parquet without pyarrow.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name one file in it ({', '.join(ENDINGS)})")
    try:
        with path.open("rb") as file:
            parquet = file.read(4) == b"PAR1"
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error}); check the name") from None
    if path.suffix not in ENDINGS and not parquet:
        raise InputError(f"{path} ends in {path.suffix or 'nothing'}; questions are read from {', '.join(ENDINGS)}")
    if parquet or path.suffix == ".parquet":
        return _parquet(path, columns)
    return _text(path, _table if path.suffix in (".csv", ".tsv") else _json)


def _text(path: Path, read: Callable[[TextIO, Path], Iterator[Row]]) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="" if read is _table else None) as file:
            yield from read(file, path)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error}); check the file") from None


def _json(file: TextIO, path: Path) -> Iterator[Row]:
    """One object a line, or one array: whichever the first line that is not empty begins."""
    skipped = 0
    for line in file:
        if line.strip():
            break
        skipped += 1
    else:
        return
    if line.lstrip().startswith("["):
        yield from _array(line.lstrip()[1:], file, path)
        return
    for number, text in enumerate(chain([line], file), skipped + 1):
        if text.strip():
            place = f"{path.name}, line {number}"
            try:
                yield place, _object(json.loads(text, object_pairs_hook=_once), place)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{place} is not JSON ({error.msg}); write one object a line, or one array of objects"
                ) from None
            except _TwiceError as error:
                raise InputError(f"{place} has the field {error.args[0]!r} twice; leave one out") from None


def _array(text: str, file: TextIO, path: Path) -> Iterator[Row]:
    """The objects of an array whose first characters behind ``[`` have been read."""
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    at, number, between = 0, 0, False
    while True:
        at = _WHITE.match(text, at).end()  # type: ignore[union-attr]
        place = f"{path.name}, entry {number + 1}"
        if at < len(text) and text[at] == "]" and (between or not number):
            if (text[at + 1 :] + file.read(CHUNK)).strip():
                raise InputError(f"{path} goes on behind its array; write one array, or one object a line")
            return
        if at < len(text) and text[at] == "," and between:
            at, between = at + 1, False
            continue
        problem = "a comma is missing before it" if between and at < len(text) else "it is cut off"
        if at < len(text) and not between:
            try:
                value, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                problem = error.msg
            except _TwiceError as error:
                raise InputError(f"{place} has the field {error.args[0]!r} twice; leave one out") from None
            else:
                yield place, _object(value, place)
                number, between = number + 1, True
                continue
        more = "" if between and at < len(text) else file.read(max(CHUNK, len(text) - at))
        if not more:
            raise InputError(f"{place} is not JSON ({problem}); write one object a line, or one array of objects")
        text, at = text[at:] + more, 0


class _TwiceError(ValueError):
    """A name stands twice in one object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwiceError(name)
        found[name] = value
    return found


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f'{place} is no object; write {{"image": "a.png", "question": "...", "answer": "..."}}')
    return value


def _table(file: TextIO, path: Path) -> Iterator[Row]:
    """CSV; where the first line has no comma, semicolons or tabs part the cells."""
    first = file.readline()
    parting = max(",;\t", key=first.count) if path.suffix == ".csv" else "\t"
    csv.field_size_limit(LONGEST_CELL)
    lines = csv.reader(chain([first], file), delimiter=parting, strict=True)
    try:
        names = [name.strip() for name in next(lines, [])]
        if len(set(names)) < len(names):
            raise InputError(f"{path.name}, line 1 names a field twice; leave one out")
        for cells in lines:
            place = f"{path.name}, line {lines.line_num}"
            if not any(cells):
                continue
            if len(cells) > len(names):
                raise InputError(f"{place} has {len(cells)} cells, line 1 names {len(names)}; put texts in quotes")
            yield place, {name: _cell(cell, name, place) for name, cell in zip(names, cells, strict=False) if cell}
    except csv.Error as error:
        raise InputError(f"{path.name}, line {lines.line_num} is not CSV ({error}); check its quotes") from None


def _cell(text: str, name: str, place: str) -> Any:
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if name in ("images", "answers", "choices"):
            raise InputError(f'{place}: "{name}" is no JSON list; write ["a", "b"]') from None
        return text


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DependencyError(f"{path} is read by pyarrow; install it: pip install 'kvferry[eval]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            known = [column for column in columns if column in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=64, columns=known or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a parquet file that can be read ({error}); check it") from None
