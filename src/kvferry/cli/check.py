"""``kvferry check``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvferry.cli.console import console, print_json, waiting
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.models.check import Verdict


def check(
    model: Annotated[
        str, typer.Argument(help="A shipped model, a folder (config.json is enough), or a Hub id.", show_default=False)
    ] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Check every family that the installed Transformers has.")
    ] = False,
    rows: Annotated[
        Path | None, typer.Option("--out", help="With --all: a file of JSON lines; a run that was stopped goes on.")
    ] = None,
    into: Annotated[Path | None, typer.Option(help="With --all: put the tables between the markers of a page.")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Try it out again, whatever was found before.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object (with --all: one a line).")] = False,
) -> None:
    """Find out whether a family of models can be served, on a small random model of it; the exit code is 1 if not."""
    if everything == bool(model):
        raise InputError("name one model to check, or pass --all")
    if everything:
        _all(rows, into, json)
        return
    with waiting(f"trying out {model}", json):
        from kvferry.models.check.families import check_name

        verdict = check_name(model, anew=anew)
    if json:
        print_json(verdict.as_dict())
    else:
        _print(verdict)
    if not verdict.supported:
        raise typer.Exit(1)


def _all(rows: Path | None, into: Path | None, json: bool) -> None:
    with waiting("importing", json):
        from kvferry.models.check.families import check_all
        from kvferry.models.check.table import summary, write_into
    verdicts = []
    for verdict in check_all(rows):
        verdicts.append(verdict)
        if json:
            print_json(verdict.as_dict())
        else:
            print(f"{verdict.family} ({verdict.model}): {_conclusion(verdict)}", flush=True)
    if into is not None:
        write_into(into, verdicts)
    console(json).print(summary(verdicts))


def _conclusion(verdict: Verdict) -> str:
    if not verdict.supported:
        return f"not supported: {verdict.reason}"
    tied = ", with the same tokens in all heads of a layer (budget=shared)" if verdict.tied_heads else ""
    return f"supported{tied}" + ("" if verdict.pictures else "; tried with text")


def _print(verdict: Verdict) -> None:
    from kvferry.models.check import TOLERANCE

    names = {
        "full": "full cache against the model's own forward pass",
        "evict": "evicted tokens against masked ones",
        "heads": "the same, other tokens in each head",
        "evidence": "attention as scorers see it against eager",
        "resume": "resumed cache against generate()",
    }
    table = Table("compared", "difference", f"at most {TOLERANCE:g}", "seen at", box=None, pad_edge=False)
    for name, difference in verdict.differences.items():
        table.add_row(names[name], str(difference), "yes" if difference.right else "no", difference.where)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    prompt = "pictures and text" if verdict.pictures else "text"
    out.print(f"{verdict.family}, {verdict.model}: a small random model, a prompt of {prompt}")
    if verdict.differences:
        out.print(table)
        out.print(f"dropping those tokens moves the answers by {verdict.moved:.2g} standard deviations of a logit")
    out.print(_conclusion(verdict), soft_wrap=True)
