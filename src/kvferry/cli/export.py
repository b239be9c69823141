"""``kvferry export``: raw results for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    results: Annotated[Path, typer.Argument(help="JSON lines of `kvferry sweep`.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
) -> None:
    """Write a sweep as a Parquet table, a row for every question, protocol and recipe, its provenance in the schema."""
    from kvferry.evaluate.export import export as write

    rows = write(results, out)
    print(f"wrote {rows:,} rows to {out}")
