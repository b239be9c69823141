"""``kvferry eval``: recipes on a benchmark."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvferry.cli.console import Device, Dtype, Model, NamedModel, console, model_of, print_json, typed
from kvferry.errors import InputError


def evaluate(
    model: Model = "",
    task: Annotated[str, typer.Option(help="testbed, vqav2, docvqa, squad_v2, ...; a wrong name lists them all.")] = "",
    named: NamedModel = "",
    recipe: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Ceiling (full cache) and floor are always added.")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option("--protocol", "--protocols", help="A (ask, then ship), B (ship, then ask), AB; by default all."),
    ] = "",
    n: Annotated[int, typer.Option(help="Questions.", min=1)] = 1000,
    start: Annotated[int, typer.Option(help="First question, in the data's order.", min=0)] = 0,
    data: Annotated[
        Path | None, typer.Option(help="JSON lines, parquet or a folder of them, instead of the Hub; same columns.")
    ] = None,
    split: Annotated[str, typer.Option(help="By default the one the benchmark is scored on.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="JSON lines; the same evaluation is continued. By default out/eval-TASK.jsonl.")
    ] = None,
    processes: Annotated[int, typer.Option(help="That share the questions.", min=1)] = 1,
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Run recipes on a benchmark, paired, and print its metrics, loyalty to the full cache and bytes."""
    from kvferry.evaluate import evaluation as engine
    from kvferry.evaluate import evaluation_tables as tables
    from kvferry.evaluate.tasks import task_of

    model = model_of(model, named)
    if not task:
        raise InputError("name a benchmark with --task, such as docvqa")
    if set(protocol) - {"A", "B"}:
        raise InputError(f"--protocol is A, B or AB, not {protocol!r}")
    plan = engine.Evaluation(
        model,
        task,
        tuple(recipe or ()),
        tuple(p for p in ("A", "B") if p in protocol),
        str(data or ""),
        split,
        n,
        start,
        device,
        dtype,
    )
    out = out or Path(f"out/eval-{task}.jsonl")
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console(json)) as progress:
        bar = progress.add_task(f"{task}, {len(plan.recipes)} recipes", total=n * len(plan.protocols))
        for _ in engine.run(plan, out, processes, typed()):
            progress.advance(bar)
    head, lines = engine.read(out)
    benchmark = task_of(task)
    found = {p: tables.summarise(benchmark, lines, p) for p in plan.protocols}
    if json:
        print_json({p: [asdict(row) for row in rows] for p, rows in found.items()})
        return
    for p, rows in found.items():
        table = Table(title=f"{task}, protocol {p}, n = {rows[0].score.n}", title_justify="left")
        for i, name in enumerate(tables.heading(benchmark, rows)):
            table.add_column(escape(name), justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, tables.cells(row)))
        screen = Console(width=None if sys.stdout.isatty() else 150)
        screen.print(table)
        screen.print(escape("\n".join(tables.notes(head, lines, p, rows))), highlight=False)
    print(f"{tables.origin(head)}\nwrote {out}")
