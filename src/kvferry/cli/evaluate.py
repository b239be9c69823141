"""``kvferry eval``: recipes on a benchmark, or on questions of one's own."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvferry.cli.console import Device, Dtype, Model, NamedModel, console, model_of, print_json, typed
from kvferry.cli.questions import Embeds, Images, Instruction, Jpeg, MaxNewTokens, Metric, codecs_of, qualities_of
from kvferry.cli.questions import own_questions as look
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.evaluate.plan import Evaluation

ROWS = 1000


def evaluate(
    model: Model = "",
    task: Annotated[
        str, typer.Option(help="A benchmark: vqav2, docvqa, squad_v2, testbed, ...; a wrong name lists them all.")
    ] = "",
    named: NamedModel = "",
    recipe: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Ceiling (full cache) and floor are always added.")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option("--protocol", "--protocols", help="A (ask, then ship), B (ship, then ask), AB; by default all."),
    ] = "",
    n: Annotated[
        int | None, typer.Option(help=f"How many questions; all of your own, or {ROWS} of a benchmark.", min=1)
    ] = None,
    start: Annotated[int, typer.Option(help="First question, in the data's order.", min=0)] = 0,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Without --task: questions of your own, JSON lines, a JSON array, CSV or Parquet. With it: the "
            "benchmark's rows in such a file, or a folder of them, instead of the Hub; same columns."
        ),
    ] = None,
    images: Images = None,
    metric: Metric = "",
    instruction: Instruction = "",
    max_new_tokens: MaxNewTokens = 0,
    jpeg: Jpeg = "",
    embeds: Embeds = "",
    split: Annotated[str, typer.Option(help="By default the one the benchmark is scored on.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="JSON lines; the same evaluation is continued. By default out/eval-NAME.jsonl.")
    ] = None,
    processes: Annotated[int, typer.Option(help="That share the questions.", min=1)] = 1,
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Run recipes on a benchmark or your own questions, paired; print scores, loyalty to the full cache, bytes."""
    from kvferry.evaluate.plan import Evaluation
    from kvferry.evaluate.tasks.own import OWN

    model = model_of(model, named)
    if not task and data is None:
        raise InputError("name the file of your questions with --data, or a benchmark with --task, such as docvqa")
    if set(protocol) - {"A", "B"}:
        raise InputError(f"--protocol is A, B or AB, not {protocol!r}")
    if not task and data is not None:
        n = look(data, images, n, start, json=json).total
    plan = Evaluation(
        model,
        task or OWN,
        tuple(recipe or ()),
        tuple(p for p in ("A", "B") if p in protocol),
        str(data or ""),
        split,
        n or ROWS,
        start,
        device,
        dtype,
        images=str(images or ""),
        metric=metric,
        instruction=instruction,
        max_new_tokens=max_new_tokens,
        jpeg=qualities_of(jpeg),
        embeds=codecs_of(embeds),
    )
    out = out or Path(f"out/eval-{task or (data or Path()).stem}.jsonl")
    run(plan, out, processes, json)


def run(plan: Evaluation, out: Path, processes: int, json: bool) -> None:
    """Run a plan behind a bar, then print its tables; the command of one's own questions in ``sweep`` too."""
    from kvferry.evaluate import evaluation as engine
    from kvferry.evaluate import evaluation_tables as tables
    from kvferry.evaluate.ceiling import check_answers
    from kvferry.evaluate.plan import planned_task

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    name = Path(plan.data).name if plan.data else plan.task
    with Progress(*columns, console=console(json)) as progress:
        bar = progress.add_task(f"{name}, {len(plan.recipes)} recipes", total=plan.n * len(plan.protocols))
        for _ in engine.run(plan, out, processes, typed()):
            progress.advance(bar)
    head, lines = engine.read(out)
    benchmark = planned_task(head["evaluation"])
    for p in plan.protocols:
        check_answers(benchmark, lines, p)
    found = {p: tables.summarise(benchmark, lines, p) for p in plan.protocols}
    if json:
        print_json({p: [asdict(row) for row in rows] for p, rows in found.items()})
        return
    for p, rows in found.items():
        table = Table(title=f"{name}, protocol {p}, n = {rows[0].score.n}", title_justify="left")
        for i, column in enumerate(tables.heading(benchmark, rows)):
            table.add_column(escape(column), justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, tables.cells(row)))
        screen = Console(width=None if sys.stdout.isatty() else 150)
        screen.print(table)
        screen.print(escape("\n".join(tables.notes(head, lines, p, rows))), highlight=False)
    print(f"{tables.origin(head)}\nwrote {out}")
