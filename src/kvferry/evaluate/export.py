"""Results as files for other tools: every answer in Parquet, CSV or JSON, tables in LaTeX, by the file's ending."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvferry.errors import DependencyError, InputError
from kvferry.evaluate.latex import latex_tables
from kvferry.evaluate.records import Outcome
from kvferry.evaluate.report.front import sheets
from kvferry.evaluate.results import Results, read_results
from kvferry.files import write_whole

META = b"kvferry"
"""Key of a Parquet file's metadata under which the provenance stands, as JSON."""
_OF_LINE = ("index", "kind", "group", "protocol", "bf16_bytes", "image_bytes", "tokens", "length")


def export(results: Path, out: Path) -> int:
    """Write a results file of a sweep or an evaluation; returns how many answers it holds.

    ``.parquet``, ``.csv`` and ``.json`` hold a row for every question, protocol and recipe. Columns are those of
    :class:`~kvferry.evaluate.records.Line`, then ``row`` (a recipe's canonical text, or what else was sent), ``score``,
    ``correct`` (null where scores are not 0 or 1), ``bytes``, ``kl``, ``attention``, ``scored`` and ``said`` (null
    where they were not measured or kept), ``model`` and ``fingerprint``. ``.json`` is one object with the provenance
    beside these ``answers`` and the ``tables`` that they come to. ``.tex`` holds these tables (package ``booktabs``).

    Raises
    ------
    InputError
        ``results`` is something else, ``out`` has another ending or cannot be written.
    DependencyError
        Parquet without pyarrow.
    """
    write = WRITERS.get(out.suffix.lower())
    if write is None:
        raise InputError(f"{out} ends in {out.suffix or 'nothing'}; name a file in {', '.join(WRITERS)}")
    found = read_results(results)
    try:
        write(found, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another place") from None
    return sum(len(line.outcomes) for line in found.lines)


def _parquet(found: Results, out: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DependencyError(f"{out} needs pyarrow: pip install 'kvferry[eval]'; or name a .csv file") from None
    names = pa.dictionary(pa.int32(), pa.string())
    kinds = {
        **dict.fromkeys(("index", "bf16_bytes", "image_bytes", "tokens", "length", "bytes"), pa.int64()),
        **dict.fromkeys(("score", "kl", "attention", "scored"), pa.float64()),
        "correct": pa.bool_(),
    }
    table = columns(found)
    schema = pa.schema(
        [(name, kinds.get(name, names)) for name in table], metadata={META: json.dumps(found.head).encode()}
    )
    whole = pa.BufferOutputStream()
    pq.write_table(pa.table(table, schema=schema), whole, compression="zstd")
    write_whole(out, whole.getvalue().to_pybytes())


def _csv(found: Results, out: Path) -> None:
    table = columns(found)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    write_whole(out, text.getvalue())


def _json(found: Results, out: Path) -> None:
    table = columns(found)
    answers = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    tables = [sheet.as_dict() for sheet in sheets(found.path)]
    whole = {"provenance": found.head, "tables": tables, "answers": answers}
    write_whole(out, json.dumps(whole, ensure_ascii=False) + "\n")


def _tex(found: Results, out: Path) -> None:
    write_whole(out, latex_tables(list(sheets(found.path))))


WRITERS: dict[str, Callable[[Results, Path], None]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".json": _json,
    ".tex": _tex,
}
"""By the ending of the file."""


def columns(found: Results) -> dict[str, list[Any]]:
    """Every column, in the order of the file."""
    rest = ("row", "score", "correct", "bytes", "kl", "attention", "scored", "said", "model", "fingerprint")
    table: dict[str, list[Any]] = {name: [] for name in (*_OF_LINE, *rest)}
    for line in found.lines:
        for row, each in line.outcomes.items():
            outcome = Outcome(*each)
            values = {name: getattr(line, name) for name in _OF_LINE} | outcome._asdict()
            values |= {
                "row": row,
                "score": float(outcome.correct),
                "correct": bool(outcome.correct) if outcome.correct in (0, 1) else None,
                "said": found.texts.get((line.index, line.protocol, row)),
                "model": found.plan["model"],
                "fingerprint": found.head.get("fingerprint"),
            }
            for name, column in table.items():
                column.append(values[name])
    return table
