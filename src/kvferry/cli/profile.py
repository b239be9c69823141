"""``kvferry profile``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvferry.cli.console import Device, Dtype, console, typed, waiting
from kvferry.cli.questions import Data, Images, Instruction, MaxNewTokens, Metric, questions_of
from kvferry.errors import InputError

DRAWN = 30


def profile(
    edge: Annotated[str, typer.Option(help="The model on the edge.")] = "testbed/cloud",
    cloud: Annotated[str, typer.Option(help="The model in the cloud.")] = "testbed/cloud",
    device: Device = "",
    dtype: Dtype = "auto",
    data: Data = None,
    images: Images = None,
    instruction: Instruction = "",
    metric: Metric = "",
    max_new_tokens: MaxNewTokens = 0,
    split: Annotated[str, typer.Option(help="Without --data: of the testbed's questions.")] = "validation",
    n: Annotated[
        int | None, typer.Option(help=f"How many questions; all of --data, or {DRAWN} drawn ones.", min=1)
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="Instead of the usual ones; repeatable.")] = None,
    tiers: Annotated[
        int, typer.Option(help="Caches travel in so many parts, and parts of them are measured too.", min=1)
    ] = 1,
    out: Annotated[Path, typer.Option(help="The table, for `kvferry ask --points` and `kvferry simulate`.")] = Path(
        "points.json"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print no table.")] = False,
) -> None:
    """Measure every mode on this machine: quality, bytes, seconds."""
    if split == "test":
        raise InputError("points that a policy chooses by are not measured on the test split; use validation")
    from kvferry.evaluate.metrics import metric_of
    from kvferry.evaluate.sweep import provenance
    from kvferry.fit import points as engine
    from kvferry.models import load
    from kvferry.policy import PointTable, write_points

    if data is None and metric:
        raise InputError("--metric needs --data FILE, which says what to ask")
    judge = metric_of(metric or "exact")
    if judge.score("yes", ("yes",)) is None:
        raise InputError(f"{metric} has no score for one answer, which a mode's quality is made of; choose another")
    questions = questions_of(data, images, split, n, DRAWN, instruction, json)
    if data is not None and "images" in questions.lacking:
        raise InputError(
            f"{questions.lacking['images']} has no picture, and modes are measured on pictures; give it one"
        )
    cases = [engine.Case(x.images, x.text, x.answers) for x in questions.each()]
    with waiting(f"loading {edge}, {cloud}", json):
        there = load(cloud, device=device or None, dtype=dtype)
        here = there if edge == cloud else load(edge, device=device or None, dtype=dtype)
    modes = tuple(mode) if mode else engine.usual_modes(here, there)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(json), transient=True) as progress:
        task = progress.add_task("questions", total=1 + len(cases))
        most = max_new_tokens or engine.MAX_NEW_TOKENS
        on_case = partial(progress.advance, task)
        points = list(engine.measure(here, there, modes, cases, tiers, on_case, judge, most))
    where = provenance(there)
    of = f"{data.name}" if data is not None else f"the testbed's {split} split"
    known = all(case.answers for case in cases)
    if not any(x.quality for x in points):
        raise InputError(
            "no mode answers any question rightly, so that no policy could choose; `kvferry eval MODEL --data FILE` "
            "shows what the model says: try --instruction 'Answer with one word.', --metric contains or another model"
        )
    counted = f"right answers ({judge.name})" if known else "right answers, or the cloud's own where none is known"
    source = (
        f"{typed()}: share of {counted} on {len(cases)} questions of {of}; message bytes; "
        f"median seconds on {where['machine']}, torch {where['torch']}, commit {where['commit'][:12] or 'unknown'}"
    )
    write_points((PointTable(f"{edge} to {cloud}", tuple(points), source),), out)
    if json:
        return
    table = Table(title=f"{edge} to {cloud}, n = {len(cases)}", title_justify="left")
    for name in ("mode", "quality [95 %]", "bytes", "edge ms", "compress", "decompress", "cloud"):
        table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=name != "mode", overflow="fold")
    for x in points:
        seconds = (x.edge_seconds, x.compress_seconds, x.decompress_seconds, x.cloud_seconds)
        name = x.mode + (" (held)" if "held_picture" in x.needs else "")
        quality = f"{x.quality:.3f} \\[{x.interval[0]:.3f}, {x.interval[1]:.3f}]"
        table.add_row(name, quality, f"{x.nbytes:,}", *(f"{1e3 * s:.1f}" for s in seconds))
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(f"wrote {out}")
