"""``kvferry sweep``: recipes on the testbed's questions, paired."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvferry.cli.console import Device, Dtype, Model, NamedModel, model_of, typed
from kvferry.cli.evaluate import run
from kvferry.cli.questions import (
    Data,
    Embeds,
    Images,
    Instruction,
    Jpeg,
    MaxNewTokens,
    Metric,
    codecs_of,
    own_questions,
    qualities_of,
)
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.evaluate.tables import Row

DRAWN = 500


def _numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",") if x]
    except ValueError:
        raise InputError(f"{text!r} is not a comma-separated list of numbers such as 0.75,0.5,0.25") from None


def sweep(
    model: Model = "",
    named: NamedModel = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines; the same sweep is continued. By default out/sweep.jsonl, or out/sweep-DATA.jsonl."
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Instead of the grid: one recipe, repeatable. The ceiling is always added.")
    ] = None,
    selections: Annotated[str, typer.Option(help="Comma-separated; ceiling and floor are always added.")] = (
        "q2c,snapkv,knorm,random"
    ),
    fractions: Annotated[str, typer.Option(help="Kept share of tokens.")] = "0.75,0.5,0.25,0.1,0.05",
    codecs: Annotated[str, typer.Option(help="Comma-separated.")] = "bf16,int8,int4",
    budgets: Annotated[str, typer.Option(help="Comma-separated, such as uniform,sparsity.")] = "uniform",
    modalities: Annotated[str, typer.Option(help="Modality policies, such as uniform,text_preserving.")] = "uniform",
    lossless: Annotated[str, typer.Option(help="'zstd', or '' for none.")] = "zstd",
    protocols: Annotated[
        str, typer.Option("--protocols", "--protocol", help="A (ask, then ship), B (ship, then ask) or AB.")
    ] = "AB",
    data: Data = None,
    images: Images = None,
    metric: Metric = "",
    instruction: Instruction = "",
    max_new_tokens: MaxNewTokens = 0,
    split: Annotated[str, typer.Option(help="Without --data: of the testbed's questions.")] = "test",
    n: Annotated[
        int | None, typer.Option(help=f"How many questions; all of --data, or {DRAWN} drawn ones.", min=1)
    ] = None,
    start: Annotated[int, typer.Option(help="First question.", min=0)] = 0,
    check: Annotated[str, typer.Option(help="'generate', or 'forced': the same for the testbed, faster.")] = "generate",
    jpeg: Jpeg = "",
    embeds: Embeds = "",
    kinds: Annotated[str, typer.Option(help="Of question, such as colour,shape; all by default.")] = "",
    apply: Annotated[
        str, typer.Option(help="'post_hoc' evicts from the finished cache; 'construction' hides while it is built.")
    ] = "post_hoc",
    processes: Annotated[int, typer.Option(help="0: one per core; with --data, 1.", min=0)] = 0,
    ray: Annotated[
        str, typer.Option(help="Spread over a Ray cluster instead: auto, local, or its head's HOST:PORT.")
    ] = "",
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run recipes over the testbed's questions or your own, paired, under protocols A and B, and print the table."""
    from kvferry.evaluate import records
    from kvferry.evaluate import sweep as engine
    from kvferry.evaluate.ceiling import check_drawn
    from kvferry.evaluate.plan import Evaluation
    from kvferry.evaluate.tables import few_note, summarise
    from kvferry.evaluate.tasks.own import OWN

    model = model_of(model, named, "testbed/cloud")
    unknown = set(protocols) - {"A", "B"}
    if unknown or not protocols:
        raise InputError(f"--protocols is A, B or AB, not {protocols!r}")
    recipes = (
        tuple(recipe)
        if recipe
        else engine.grid(
            selections.split(","),
            _numbers(fractions),
            codecs.split(","),
            lossless,
            budgets=budgets.split(","),
            modalities=modalities.split(","),
        )
    )
    if not any(x.startswith("full|bf16") for x in recipes):
        recipes = ("full|bf16", *recipes)  # no table without its ceiling
    if data is not None:
        drawn = (("split", split, "test"), ("check", check, "generate"), ("kinds", kinds, ""), ("ray", ray, ""))
        for option, value, usual in (*drawn, ("apply", apply, "post_hoc")):
            if value != usual:
                raise InputError(f"--{option} is for the testbed's questions; leave it out with --data")
        asked = own_questions(data, images, n, start, json=json)
        if not recipe and "images" not in asked.having:
            recipes = tuple(x for x in recipes if not x.startswith("none|"))  # nothing visual to leave out
        plan_of_own = Evaluation(
            model,
            OWN,
            recipes,
            tuple(p for p in ("A", "B") if p in protocols),
            str(data),
            n=asked.total,
            start=start,
            device=device,
            dtype=dtype,
            images=str(images or ""),
            metric=metric,
            instruction=instruction,
            max_new_tokens=max_new_tokens,
            jpeg=qualities_of(jpeg),
            embeds=codecs_of(embeds),
        )
        run(plan_of_own, out or Path(f"out/sweep-{data.stem}.jsonl"), processes or 1, json)
        return
    for option, given in (("images", images), ("metric", metric), ("instruction", instruction)):
        if given:
            raise InputError(f"--{option} needs --data FILE, which says what to ask")
    out = out or Path("out/sweep.jsonl")
    if check not in ("generate", "forced"):
        raise InputError(f"--check is generate or forced, not {check!r}")
    if apply not in ("post_hoc", "construction"):
        raise InputError(f"--apply is post_hoc or construction, not {apply!r}")
    plan = engine.Sweep(
        model,
        recipes,
        tuple(p for p in ("A", "B") if p in protocols),
        split,
        n or DRAWN,
        start,
        max_new_tokens=max_new_tokens or engine.Sweep.max_new_tokens,
        check=check,  # type: ignore[arg-type]
        kinds=tuple(k for k in kinds.split(",") if k),
        apply=apply,  # type: ignore[arg-type]
        jpeg=qualities_of(jpeg),
        embeds=codecs_of(embeds),
        device=device,
        dtype=dtype,
    )
    console = Console(stderr=True, quiet=json)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    before = len(records.read(out)[1]) if out.exists() and out.stat().st_size else 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{len(recipes)} recipes", total=plan.n * len(plan.protocols), completed=before)
        for _ in engine.run(plan, out, processes or os.cpu_count() or 1, typed(), ray):
            progress.advance(task)
    _, lines = records.read(out)
    for p in plan.protocols:
        check_drawn(plan, lines, p)
    tables = {p: summarise(lines, p) for p in plan.protocols}
    if json:
        print(
            jsonlib.dumps(
                {
                    p: [
                        {
                            "recipe": r.name,
                            "accuracy": r.accuracy.mean,
                            "low": r.accuracy.low,
                            "high": r.accuracy.high,
                            "n": r.accuracy.n,
                            "of_full": r.of_full.mean,
                            "bytes": r.bytes,
                            "ratio": r.ratio,
                            "scored": r.scored,
                        }
                        for r in rows
                    ]
                    for p, rows in tables.items()
                }
            )
        )
        return
    for protocol, rows in tables.items():
        out_console = Console(width=None if sys.stdout.isatty() else 100)
        out_console.print(_table(protocol, rows))
        for note in filter(None, few_note([row.scored for row in rows])):
            out_console.print(escape(note))


def _table(protocol: str, rows: Sequence[Row]) -> Table:
    """One line per recipe."""
    from kvferry.evaluate.tables import FEW, chose_little

    table = Table(title=f"Protocol {protocol}, n = {rows[0].accuracy.n}", title_justify="left")
    for name in ("recipe", "accuracy [95 %]", "% of full", "bytes", "x smaller"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    for row in rows:
        a = row.accuracy
        end = {"full": " (ceiling)", "none": " (floor)"}.get(row.selection, "")
        interval = escape(f"{a.mean:.3f} [{a.low:.3f}, {a.high:.3f}]")
        share, size = f"{100 * row.of_full.mean:.1f}", f"{row.bytes:,.0f}"
        mark = f" {FEW}" if chose_little(row.scored) else ""
        table.add_row(row.name + end + mark, interval, share, size, f"{row.ratio:.1f}")
    return table
