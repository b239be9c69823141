"""A sweep as one Parquet table: a row for every question, protocol and recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvferry.errors import InputError
from kvferry.evaluate.records import Line, Outcome, read

META = b"kvferry"
"""Key of the file's metadata under which the provenance stands, as JSON."""
_OF_LINE = ("index", "kind", "protocol", "bf16_bytes", "image_bytes", "tokens", "length")


def export(results: Path, out: Path) -> int:
    """Write the lines of a sweep, in long form; returns how many rows.

    Columns are those of :class:`~kvferry.evaluate.records.Line`, then ``row`` (a recipe's canonical text, or what else
    was sent), ``correct``, ``bytes``, ``kl``, ``attention`` and ``scored`` (null where they were not measured).

    Raises
    ------
    InputError
        ``results`` is no sweep's, ``out`` cannot be written, or pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError("Parquet needs pyarrow: pip install 'kvferry[eval]'") from None
    head, lines = read(results)
    names = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema(
        [
            ("index", pa.int64()), ("kind", names), ("protocol", names), ("bf16_bytes", pa.int64()),
            ("image_bytes", pa.int64()), ("tokens", pa.int64()), ("length", pa.int64()), ("row", names),
            ("correct", pa.bool_()), ("bytes", pa.int64()), ("kl", pa.float64()), ("attention", pa.float64()),
            ("scored", pa.float64()),
        ],
        metadata={META: json.dumps(head).encode()},
    )  # fmt: skip
    table = pa.table(columns(lines), schema=schema)
    try:
        pq.write_table(table, out, compression="zstd")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another place") from None
    return int(table.num_rows)


def columns(lines: list[Line]) -> dict[str, list[Any]]:
    """Every column, in the order of the file."""
    found: dict[str, list[Any]] = {name: [] for name in (*_OF_LINE, "row", *Outcome._fields)}
    for line in lines:
        for row, outcome in line.outcomes.items():
            for name in _OF_LINE:
                found[name].append(getattr(line, name))
            found["row"].append(row)
            for name, value in zip(Outcome._fields, Outcome(*outcome), strict=True):
                found[name].append(bool(value) if name == "correct" else value)
    return found
