"""``kvferry analyze``: what a model's cache and attention look like, and what follows for compressing it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvferry.cli.console import Device, Dtype, Model, NamedModel, model_of, print_json, typed, waiting
from kvferry.cli.questions import Images, Instruction, OldData, questions_of
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.analyze import Analysis

DRAWN = 240


def analyze(
    model: Model = "",
    named: NamedModel = "",
    data: OldData = None,
    images: Images = None,
    instruction: Instruction = "",
    split: Annotated[str, typer.Option(help="Without --data: a split of the testbed.")] = "validation",
    n: Annotated[
        int | None, typer.Option(help=f"How many questions; all of a file, or {DRAWN} drawn ones.", min=1)
    ] = None,
    against: Annotated[str | None, typer.Option(help="A second model: do both keep the same tokens?")] = None,
    html: Annotated[Path | None, typer.Option("--html", "--out", help="Write a report with figures.")] = None,
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print every figure as one JSON object.")] = False,
) -> None:
    """Measure ranks, sparsity, attention and kept tokens by layer and modality, and answer what follows from them."""
    model = model_of(model, named)
    if html is not None and not html.parent.is_dir():
        raise InputError(f"there is no folder {html.parent} for the report; make it first")
    with waiting("loading", json):
        from kvferry.analyze import analyze as measure
        from kvferry.analyze import paragraph
        from kvferry.analyze.report import write_html
        from kvferry.evaluate.sweep import provenance
        from kvferry.models import load

        asked = questions_of(data, images, split, n, DRAWN, instruction, json)
        vlm = load(model, device=device or None, dtype=dtype)
        other = None if against is None else load(against, device=device or None, dtype=dtype)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("reading", total=asked.total)
        analysis = measure(vlm, asked, other, on_sample=lambda: progress.advance(task))
    if html is not None:
        write_html(analysis, html)
    if json:
        print_json({"command": typed(), **provenance(vlm), **analysis.as_dict()})
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(paragraph(analysis.answers), markup=False)
    if analysis.against is not None:
        console.print(_agreement(analysis))
    console.print(_table(analysis))
    if html is not None:
        console.print(f"Report: {html}", markup=False)


def _table(analysis: Analysis) -> Table:
    """One line per layer."""
    from kvferry.analyze.tail import TOP
    from kvferry.analyze.watch import POST_VISION, QUESTION

    table = Table(title=f"{analysis.model}, n = {analysis.prompts.n}: visual / text", title_justify="left")
    for name in ("layer", "rank of keys", "of values", "sparsity", "question's mass", f"top {TOP} % hold"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in range(analysis.layers):
        cells = [
            *(_pair(analysis.rank.mean[0, layer, kind].tolist(), "{:.1f}") for kind in (0, 2)),
            _pair(analysis.sparsity.mean[layer, POST_VISION].tolist(), "{:.0%}"),
            _pair(analysis.mass.mean[layer, QUESTION].tolist(), "{:.0%}"),
            _pair([float(x[layer, TOP]) for x in (analysis.tail.visual, analysis.tail.text)], "{:.0%}"),
        ]
        table.add_row(str(layer), *cells)
    return table


def _agreement(analysis: Analysis) -> Table:
    """One line per scorer: does the second model keep the same?"""
    from kvferry.analyze.observe import FRACTIONS
    from kvferry.analyze.verdicts import agreement, interval_text

    table = Table(title=f"overlap with what {analysis.against} keeps [95 %]", title_justify="left")
    table.add_column("scorer", no_wrap=True)
    for fraction in FRACTIONS:
        table.add_column(f"{fraction:.0%} kept", justify="right", no_wrap=True)
    for name, row in agreement(analysis.overlap):
        table.add_row(name, *(escape(interval_text(x)) for x in row))
    return table


def _pair(values: list[float], form: str) -> str:
    return " / ".join("-" if x != x else form.format(x) for x in values)
