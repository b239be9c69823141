"""``kvferry sweep`` and ``kvferry results``: raw results, and the tables made from them."""

from __future__ import annotations

import json as jsonlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.evaluate.tables import Row

SECTIONS = {
    "headline": "The headline: fewest bytes at 98 % of the full cache's accuracy",
    "codecs": "How few bits: every codec",
    "selection": "Which tokens, how few bits: a first look",
    "scorers": "Which tokens: every scorer",
    "text": "Which tokens: the sources' scorers with all text kept",
    "policies": "Which tokens: modality policies at equal numbers of tokens",
    "construction": "Which tokens: hidden while the cache is built",
    "eval": "Answers and loyalty: kvferry eval",
    "scout": "Which tokens, by another model: mode scout on trial",
    "points": "Every mode: bytes, quality, time",
    "turns": "Long runs: ten questions in turn",
    "drift": "Long runs: two hundred tokens on one cache",
    "pictures": "Long runs: several pictures in one prompt",
    "rare": "Long runs: what is seldom seen",
}
"""Title of a section by the first word of its raw file's name; the rest of the name says which model."""
WHERE = {"scout": "chosen by the {} model", "points": "with the {} model on the edge"}
"""How a title goes on; "on the {} model" for the others."""
METHODS = ("scorers", "text", "policies", "construction")
"""Sections that compare methods at one codec; those of unknown kinds hold several of both."""
LONG_RUNS = ("turns", "drift", "pictures", "rare")
"""Sections whose raw files are those of ``kvferry long-runs``."""


def _numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",") if x]
    except ValueError:
        raise InputError(f"{text!r} is not a comma-separated list of numbers such as 0.75,0.5,0.25") from None


def sweep(
    model: Annotated[str, typer.Option(help="Shipped name, folder or Hub id.")] = "testbed/cloud",
    out: Annotated[Path, typer.Option(help="JSON lines; an existing file of the same sweep is continued.")] = Path(
        "results/selection-cloud.jsonl"
    ),
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
    protocols: Annotated[str, typer.Option(help="A (ask, then ship), B (ship, then ask) or AB.")] = "AB",
    split: Annotated[str, typer.Option(help="Of the testbed's questions.")] = "test",
    n: Annotated[int, typer.Option(help="Questions.", min=1)] = 500,
    start: Annotated[int, typer.Option(help="First question.", min=0)] = 0,
    check: Annotated[str, typer.Option(help="'generate', or 'forced': the same for the testbed, faster.")] = "generate",
    jpeg: Annotated[str, typer.Option(help="Also send the pictures, at these JPEG qualities, such as 90,30,10.")] = "",
    embeds: Annotated[str, typer.Option(help="Also send the visual embeddings, in codecs such as int4,int2.")] = "",
    kinds: Annotated[str, typer.Option(help="Of question, such as colour,shape; all by default.")] = "",
    apply: Annotated[
        str, typer.Option(help="'post_hoc' evicts from the finished cache; 'construction' hides while it is built.")
    ] = "post_hoc",
    processes: Annotated[int, typer.Option(help="0: one per core.", min=0)] = 0,
    ray: Annotated[
        str, typer.Option(help="Spread over a Ray cluster instead: auto, local, or its head's HOST:PORT.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run recipes over test questions, paired, under protocols A and B, and print the table."""
    from kvferry.evaluate import raw
    from kvferry.evaluate import sweep as engine
    from kvferry.evaluate.tables import summarise

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
    if check not in ("generate", "forced"):
        raise InputError(f"--check is generate or forced, not {check!r}")
    if apply not in ("post_hoc", "construction"):
        raise InputError(f"--apply is post_hoc or construction, not {apply!r}")
    plan = engine.Sweep(
        model,
        recipes,
        tuple(p for p in ("A", "B") if p in protocols),
        split,
        n,
        start,
        check=check,  # type: ignore[arg-type]
        kinds=tuple(k for k in kinds.split(",") if k),
        apply=apply,  # type: ignore[arg-type]
        jpeg=tuple(int(q) for q in _numbers(jpeg)),
        embeds=tuple(x for x in embeds.split(",") if x),
    )
    console = Console(stderr=True, quiet=json)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    before = len(raw.read(out)[1]) if out.exists() and out.stat().st_size else 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{len(recipes)} recipes", total=n * len(plan.protocols), completed=before)
        command = "kvferry " + shlex.join(sys.argv[1:])
        for _ in engine.run(plan, out, processes or os.cpu_count() or 1, command, ray):
            progress.advance(task)
    _, lines = raw.read(out)
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
                        }
                        for r in rows
                    ]
                    for p, rows in tables.items()
                }
            )
        )
        return
    for protocol, rows in tables.items():
        Console(width=None if sys.stdout.isatty() else 100).print(_table(protocol, rows))


def _table(protocol: str, rows: Sequence[Row]) -> Table:
    """One line per recipe."""
    table = Table(title=f"Protocol {protocol}, n = {rows[0].accuracy.n}", title_justify="left")
    for name in ("recipe", "accuracy [95 %]", "% of full", "bytes", "x smaller"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    for row in rows:
        a = row.accuracy
        end = {"full": " (ceiling)", "none": " (floor)"}.get(row.selection, "")
        interval = escape(f"{a.mean:.3f} [{a.low:.3f}, {a.high:.3f}]")
        share, size = f"{100 * row.of_full.mean:.1f}", f"{row.bytes:,.0f}"
        table.add_row(row.name + end, interval, share, size, f"{row.ratio:.1f}")
    return table


def results(
    raw: Annotated[Path, typer.Option(help="Folder of raw results.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("RESULTS.md"),
    figures: Annotated[Path, typer.Option(help="Where its figures go.")] = Path("docs/figures"),
    details: Annotated[
        Path | None, typer.Option(help="Where the pages with every row go; results/ beside the figures.")
    ] = None,
) -> None:
    """Make RESULTS.md and its figures from the stored raw results."""
    from kvferry.evaluate import (
        claims,
        codec_tables,
        evaluation_tables,
        headline,
        long_tables,
        method_tables,
        mode_tables,
        scout_tables,
        tables,
    )
    from kvferry.evaluate.raw import kind_of

    files = sorted([*raw.glob("*.jsonl"), *raw.glob("points-*.json")], key=_section)
    if not files:
        raise InputError(f"no raw results in {raw}; `kvferry sweep` and `kvferry eval` make them")
    places = tables.Places(out, figures, details or figures.parent / "results")
    renders = dict.fromkeys(METHODS, method_tables.render) | dict.fromkeys(LONG_RUNS, long_tables.render)
    renders |= {"headline": headline.render, "codecs": codec_tables.render}
    renders |= {"scout": scout_tables.render, "points": mode_tables.render}
    sections = [f"# Results\n\nMade by `make results` from the raw files in `results/`.\n\n{tables.CAVEAT}\n"]
    sections.append(claims.render(raw, places))
    for file in files:
        kind, _, model = file.stem.partition("-")
        render = evaluation_tables.render if kind_of(file) == "evaluation" else renders.get(kind, tables.render)
        where = WHERE.get(kind, "on the {} model").format(model)
        title = f"{SECTIONS[kind]}, {where}" if kind in SECTIONS else file.stem
        sections.append(render(file, places, title))
    out.write_text("\n".join(sections))
    print(f"wrote {out} from {len(files)} file(s)")


def _section(file: Path) -> tuple[int, str]:
    """Known sections in their order, then the others by name."""
    kind = file.stem.partition("-")[0]
    return (list(SECTIONS).index(kind) if kind in SECTIONS else len(SECTIONS)), file.stem
