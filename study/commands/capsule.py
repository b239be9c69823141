"""``python -m study capsule``: KVCapsule's claim on trial."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvferry.cli.console import console, typed


def capsule(
    model: Annotated[str, typer.Option(help="Whose visual tokens go into a capsule.")] = "testbed/cloud",
    n: Annotated[int, typer.Option(help="Questions of the test split.", min=1)] = 1000,
    profiles: Annotated[Path, typer.Option(help="Folder of profiles, made where they are not there.")] = Path(
        "out/capsule"
    ),
    out: Annotated[
        Path | None, typer.Option(help="Raw results; a second run goes on. study/results/capsule-MODEL.jsonl.")
    ] = None,
) -> None:
    """Capsules at several sizes, their variants, and rivals, on the same questions under both protocols."""
    from study import capsule as study

    said = console()
    out = out or Path(f"study/results/capsule-{Path(model).name}.jsonl")
    study.make_profile(model, profiles, said.print)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=said, transient=True) as progress:
        task = progress.add_task("questions, in both protocols", total=2 * n)
        for _ in study.ask(model, n, out, profiles, typed("python -m study")):
            progress.advance(task)
    print(f"wrote {out}; `python -m study results` makes its tables")
