"""``python -m study scout-overlap``: does a small model choose for a large one what that would choose itself?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvferry.cli.console import console, print_json, typed
from kvferry.errors import InputError


def scout_overlap(
    edge: Annotated[str, typer.Option(help="The model that chooses.")] = "testbed/edge",
    cloud: Annotated[str, typer.Option(help="The model that answers.")] = "testbed/cloud",
    out: Annotated[Path, typer.Option(help="JSON lines; an existing file of the same trial is continued.")] = Path(
        "study/results/scout-edge.jsonl"
    ),
    scorers: Annotated[str, typer.Option(help="Comma-separated.")] = "q2c,snapkv,vlcache,leaveout",
    fractions: Annotated[str, typer.Option(help="Kept shares of the visual tokens.")] = "0.75,0.5,0.25,0.1",
    split: Annotated[str, typer.Option(help="Of the testbed's questions.")] = "test",
    n: Annotated[int, typer.Option(help="Questions.", min=1)] = 1000,
    start: Annotated[int, typer.Option(help="First question.", min=0)] = 0,
    kinds: Annotated[str, typer.Option(help="Of question, such as colour,shape; all by default.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Mode scout on trial: overlap of two models' choices, answers from either, and bytes of the positions."""
    from study import scout as engine
    from study.scout_rows import Scouted

    try:
        shares = tuple(float(x) for x in fractions.split(","))
    except ValueError:
        raise InputError(f"{fractions!r} is not a list of shares such as 0.5,0.25") from None
    names = tuple(x for x in scorers.split(",") if x)
    trial = engine.Trial(edge, cloud, names, shares, split, n, start, tuple(x for x in kinds.split(",") if x))
    before = len(engine.read(out)[1]) if out.exists() and out.stat().st_size else 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console(json), transient=True) as progress:
        task = progress.add_task("questions", total=max(n, before), completed=before)
        for _ in engine.run(trial, out, typed("python -m study")):
            progress.advance(task)
    found = Scouted(*engine.read(out))
    if json:
        print_json({"out": str(out), "n": found.n, "rows": found.summary()})
        return
    ends = ", ".join(f"{what} {found.accuracy(row).mean:.3f}" for row, what in found.ENDS.items())
    table = Table(
        title=f"{edge} chooses for {cloud}, protocol A, n = {found.n}: right with {ends}", title_justify="left"
    )
    for name in ("ranking", "overlap [95 %]", "by chance", "own choice", "the edge's", "at random", "bytes sent"):
        table.add_column(name, justify="left" if name == "ranking" else "right", no_wrap=True)
    for row in found.rankings:
        overlap = found.overlap(row)
        answers = (found.accuracy(f"{row} {whose}").mean for whose in ("own", "edge", "random"))
        table.add_row(
            row,
            escape(f"{overlap.mean:.3f} [{overlap.low:.3f}, {overlap.high:.3f}]"),
            f"{found.chance(row).mean:.3f}",
            *(f"{x:.3f}" for x in answers),
            f"{found.sent(row).mean:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(f"wrote {out}")
