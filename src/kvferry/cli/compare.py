"""``kvferry compare``: two runs on the same questions."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.console import print_json


def compare(
    first: Annotated[Path, typer.Argument(help="Results of `kvferry sweep` or `kvferry eval`.", metavar="A.jsonl")],
    second: Annotated[
        Path, typer.Argument(help="Another run's on the same questions, or the same file.", metavar="B.jsonl")
    ],
    row: Annotated[
        str, typer.Option(help="Only this row of A, such as 'full|int4'; by default all that both have.")
    ] = "",
    other: Annotated[str, typer.Option(help="The row of B that --row is held against; by default the same.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Hold two runs against each other, paired on the same questions: differences with intervals, what they show."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from kvferry.errors import InputError
    from kvferry.evaluate.compare import compare as hold
    from kvferry.evaluate.results import read_results
    from kvferry.evaluate.tables import interval

    if other and not row:
        raise InputError("--other needs --row, the row of A that it is held against")
    one, two = read_results(first), read_results(second)
    found = hold(one, two, row, other)
    if json:
        plain = {p: [asdict(x) | {"shows": x.words} for x in pairs] for p, pairs in found.items()}
        print_json({"score": one.score, "a": one.head, "b": two.head, "protocols": plain})
        return
    screen = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    unit = "" if one.higher_is_better else " in nats (lower is better)"
    for protocol, pairs in found.items():
        title = f"Protocol {protocol}, {one.score}{unit}, n = {pairs[0].one.n} questions of both"
        table = Table(title=title, title_justify="left")
        for name in ("row", "A [95 %]", "B [95 %]", "B - A [95 %]", "", "p (Holm)", "bytes of A", "of B"):
            table.add_column(escape(name), justify="left" if name == "row" else "right", overflow="fold")
        for x in pairs:
            table.add_row(
                escape(x.row if x.row == x.other else f"{x.row} / {x.other}"),
                *(escape(interval(each)) for each in (x.one, x.two, x.difference)),
                x.words,
                f"{x.p:.3f}",
                f"{x.bytes:,.0f}",
                f"{x.other_bytes:,.0f}",
            )
        screen.print(table)
    for letter, run in (("A", one), ("B", two)):
        screen.print(escape(f"{letter}: {run.path}, {run.model}; {run.asked}; `{run.head.get('command', '')}`"))
