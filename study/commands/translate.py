"""``python -m study translate``: is a large model better on the small one's cache than the small one itself?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvferry.cli.console import console, typed


def translate(
    edge: Annotated[str, typer.Option(help="The model whose cache is sent.")] = "testbed/edge",
    cloud: Annotated[str, typer.Option(help="The model that answers.")] = "testbed/cloud",
    translator: Annotated[Path, typer.Option(help="The file of kvferry fit translator.")] = Path(
        "testbed/cloud/edge.translator"
    ),
    out: Annotated[Path, typer.Option(help="JSON lines; an existing file of the same trial is continued.")] = Path(
        "study/results/translate-edge.jsonl"
    ),
    recipes: Annotated[
        str, typer.Option(help="Of the edge's cache, separated by semicolons; several by default.")
    ] = "",
    split: Annotated[str, typer.Option(help="Of the testbed's questions.")] = "test",
    n: Annotated[int, typer.Option(help="Questions.", min=1)] = 1000,
    start: Annotated[int, typer.Option(help="First question.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="In which both models compute.")] = "auto",
) -> None:
    """Mode translate on trial: answers and bytes of every recipe, and the edge's own answers beside them."""
    from kvferry.models import load
    from kvferry.modes.translators import add
    from study import translate as engine

    small, large = (load(x, dtype=dtype) for x in (edge, cloud))
    made = add(translator, large)
    chosen = tuple(x.strip() for x in recipes.split(";") if x.strip()) or engine.RECIPES
    trial = engine.Trial(edge, cloud, made.digest, chosen, split, n, start)
    before = len(engine.read(out)[1]) if out.exists() and out.stat().st_size else 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console(), transient=True) as progress:
        task = progress.add_task("questions", total=max(n, before), completed=before)
        for _ in engine.run(trial, small, large, made, out, typed("python -m study")):
            progress.advance(task)
    _, lines = engine.read(out)
    for row in lines[0].rows:
        right, size = (sum(line.rows[row][i] for line in lines) / len(lines) for i in range(2))
        print(f"{row}: right {right:.3f}, {size:,.0f} bytes (n = {len(lines)})")
    print(f"wrote {out}")
