"""``kvferry export``: results for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    results: Annotated[Path, typer.Argument(help="Results of `kvferry sweep` or `kvferry eval`.")],
    out: Annotated[Path, typer.Argument(help="File to write: .parquet, .csv, .json, or .tex for LaTeX tables.")],
) -> None:
    """Write results for other tools, in the form that OUT ends in: every answer, or LaTeX tables."""
    from kvferry.evaluate.export import export as write

    answers = write(results, out)
    print(f"wrote {out} from {answers:,} answers")
