"""``kvferry simulate``: what a policy would have done on recorded links."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvferry.cli.console import print_json, typed
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.link import Trace
    from kvferry.policy import PointTable
    from kvferry.policy.simulation.report import Row

RATE_ENDS = ("bit", "bits", "bps", "bit/s")


def simulate(
    trace: Annotated[
        list[str], typer.Option(help="A trace file, a folder of them, a shipped name, or a rate; repeatable.")
    ],
    points: Annotated[str, typer.Option(help="JSON file of operating points, or the shipped scout-paper.")] = (
        "scout-paper"
    ),
    table: Annotated[
        list[str] | None, typer.Option(help="Of that file; agents take several in turn. The first by default.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="greedy[:SAFETY], risk-aware[:EPSILON], each @ewma:A, @harmonic or @quantile; static:MODE."),
    ] = None,
    deadline: Annotated[str, typer.Option(help="Seconds; several after commas.")] = "1,3,5",
    agents: Annotated[int, typer.Option(help="On one uplink.", min=1)] = 1,
    arrivals: Annotated[str, typer.Option(help="sync: all at once. poisson: each by itself.")] = "sync",
    allocation: Annotated[
        list[str] | None, typer.Option(help="equal, model_aware, max_min, quality or marginal; for agents in sync.")
    ] = None,
    every: Annotated[float | None, typer.Option(help="Seconds between an agent's questions; 5, or the deadline.")] = (
        None
    ),
    requests: Annotated[int, typer.Option(help="Questions per way and deadline, about.", min=1)] = 20_000,
    session: Annotated[int, typer.Option(help="Questions of an agent before it starts afresh.", min=1)] = 50,
    probe: Annotated[int, typer.Option(help="Fill shorter messages up to so many bytes to hear the link.", min=0)] = (
        65_536
    ),
    scale: Annotated[float, typer.Option(help="Multiply the rates of .tsv traces.", min=1e-6)] = 1.0,
    rtt: Annotated[float, typer.Option(help="Round trip in ms.", min=0)] = 40.0,
    queue: Annotated[float, typer.Option(help="Seconds that every question waits in the cloud.", min=0)] = 0.0,
    prefill_queue: Annotated[float, typer.Option(help="More seconds for what the cloud must prefill.", min=0)] = 0.0,
    privacy: Annotated[list[str] | None, typer.Option(help="no-pixels, no-embeds; repeatable.")] = None,
    holds: Annotated[bool, typer.Option("--holds-picture", help="The cloud holds the picture already.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    png: Annotated[Path | None, typer.Option(help="Write the figure.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the figure and the table.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every row as one JSON object.")] = False,
) -> None:
    """Run policies over traces and compare them with the oracle and with single modes."""
    from kvferry.evaluate.sweep import provenance
    from kvferry.policy import Context, Way
    from kvferry.policy.allocation import ALLOCATORS
    from kvferry.policy.simulation import Scenario, report
    from kvferry.policy.simulation import simulate as run

    tables = _tables(points, table)
    traces = [found for name in trace for found in _traces(name, scale)]
    ways = [Way.parse(text) for text in policy or _default_ways(tables)]
    several = arrivals == "sync" and agents > 1
    shares = (allocation or ["equal", "model_aware", "quality"]) if several else [""]
    if unknown := set(allocation or ()) - set(ALLOCATORS):
        raise InputError(f"there is no allocation {', '.join(sorted(unknown))}; use {', '.join(ALLOCATORS)}")
    scenarios = [
        Scenario(
            tables,
            tuple(found for _, found in traces),
            Context(
                seconds,
                rtt / 1000,
                queue,
                prefill_queue,
                frozenset(privacy or ()),
                frozenset({"held_picture"} if holds else ()),
            ),
            agents,
            arrivals,  # type: ignore[arg-type]
            max(5.0, seconds) if every is None else every,
            requests,
            session,
            probe,
            seed,
        )
        for seconds in _deadlines(deadline)
    ]
    rows: list[Row] = []
    with _progress() as progress:
        for scenario in scenarios:
            cases = [(way, share) for way in ways for share in shares if way.text != "oracle"]
            total = (len(cases) + 1) * scenario.lanes * scenario.episode * agents * len(traces)
            task = progress.add_task(f"deadline {scenario.context.deadline:g} s", total=total)

            def advance(count: int, task: Any = task) -> None:
                progress.advance(task, count)

            best = "quality" if several else ""
            oracle = run(scenario, Way.parse("oracle"), "quality", advance)
            for way, share in cases:
                outcome = run(scenario, way, share or "quality", advance)
                rows.append(report.row(scenario.context.deadline, way.text, share, outcome, oracle))
            rows.append(report.row(scenario.context.deadline, "oracle", best, oracle, oracle))
    title = f"{agents} agent{'s' if agents > 1 else ''}, {', '.join(x.name for x in tables)}, {_links(traces)}"
    if png is not None:
        report.write_png(report.draw(rows, title), png)
    if html is not None:
        facts = {"command": "kvferry " + " ".join(sys.argv[1:]), **{x.name: x.source for x in tables}}
        report.write_html(rows, facts, title, html)
    if json:
        about = {"command": typed(), **provenance(), "tables": {x.name: x.source for x in tables}, "rtt": rtt / 1000}
        print_json({"title": title, **about, "requests": requests, "rows": [x.as_dict() for x in rows]})
        return
    _print(rows, title, several)


def _print(rows: Sequence[Row], title: str, several: bool) -> None:
    from kvferry.policy.simulation.report import COLUMNS, cells

    shown = [name for name in COLUMNS if several or name != "rounds %"]
    grid = Table(title=title, title_justify="left")
    for name in shown:
        left = name in ("way", "modes")
        grid.add_column(name, justify="left" if left else "right", no_wrap=name != "modes")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.deadline != row.deadline:
            grid.add_section()
        texts = dict(zip(COLUMNS, cells(row), strict=True))
        grid.add_row(*(escape(texts[name]) for name in shown))
    Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(grid)


def _tables(points: str, names: Sequence[str] | None) -> tuple[PointTable, ...]:
    from kvferry.policy import read_points

    found = {table.name: table for table in read_points(points)}
    if unknown := set(names or ()) - set(found):
        raise InputError(f"{points} has no table {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return tuple(found[name] for name in names or [next(iter(found))])


def _traces(name: str, scale: float) -> list[tuple[str, Trace]]:
    import numpy as np

    from kvferry.link import Rate, RateTrace, read_trace

    if Path(name).is_dir():
        files = sorted(x for x in Path(name).iterdir() if x.suffix in (".up", ".tsv", ".txt", ".down"))
        if not files:
            raise InputError(f"there are no traces (.up, .down, .txt, .tsv) in {name}; give a file")
        return [(file.stem, read_trace(file, scale if file.suffix == ".tsv" else 1.0)) for file in files]
    if name.lower().endswith(RATE_ENDS) and not Path(name).exists():
        return [(name, RateTrace(np.array([Rate.parse(name).bits_per_second]), 1.0))]
    return [(Path(name).stem, read_trace(name, scale if name.endswith(".tsv") else 1.0))]


def _links(traces: Sequence[tuple[str, Trace]]) -> str:
    from kvferry.link.trace import mean_rate

    rates = sorted(mean_rate(found) / 1e6 for _, found in traces)
    if len(traces) == 1:
        return f"{traces[0][0]} ({rates[0]:.3g} Mbit/s)"
    return f"{len(traces)} links of {rates[0]:.3g} to {rates[-1]:.3g} Mbit/s on average"


def _default_ways(tables: Sequence[PointTable]) -> list[str]:
    """Both policies, and every mode that all tables have."""
    common = [x.mode for x in tables[0].points if all(x.mode in {y.mode for y in t.points} for t in tables)]
    return ["greedy", "risk-aware", *(f"static:{mode}" for mode in common)]


def _deadlines(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r} is not a list of seconds such as 1,3,5") from None


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
