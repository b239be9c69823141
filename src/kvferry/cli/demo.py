"""``kvferry demo``: the main job on real input, start to end, in a few minutes."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvferry.cli.console import Device, Dtype, Model, NamedModel, model_of
from kvferry.errors import InputError
from kvferry.files import write_whole

if TYPE_CHECKING:
    from kvferry.edge import Answer
    from kvferry.testbed import Sample

RECIPES = (
    "full|bf16",
    "full|int8|zstd",
    "full|int4|zstd",
    "snapkv@0.25|int4|zstd",
    "vlcache@0.1|int4|zstd",
    "q2c@0.25|int4|zstd",
    "leaveout@0.05|int4|zstd",
    "none|int4|zstd",
)
SHORTEST = "leaveout@0.15,budget=shared|transform:96"
"""Only for models with a profile, such as the shipped ones."""
SHOWN = ("snapkv@0.25|int4|zstd", "leaveout@0.05|int4|zstd")
IMAGE = "image (JPEG)"
MARKS = ("<!-- demo -->", "<!-- /demo -->")


@dataclass(frozen=True)
class Crossing:
    """One question answered in one way."""

    way: str
    sample: Sample
    answer: Answer
    right: bool


def demo(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("out/demo.png"),
    model: Model = "",
    named: NamedModel = "",
    uplink: Annotated[str, typer.Option(help="Emulated rate, such as 10mbit.")] = "10mbit",
    n: Annotated[int, typer.Option(help="Questions.", min=1, max=200)] = 20,
    start: Annotated[int, typer.Option(help="First test question.", min=0)] = 0,
    into: Annotated[Path | None, typer.Option(help="A page whose demo block is replaced by this run's table.")] = None,
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Draw test scenes, ask real questions across an emulated uplink in several ways, show what each cost."""
    from kvferry.cloud.child import cloud_process
    from kvferry.codecs.profile_store import has_profile
    from kvferry.edge import Edge
    from kvferry.evaluate.results import SHIPPED
    from kvferry.models import load
    from kvferry.testbed import exact_match, samples

    model = model_of(model, named, "testbed/cloud")
    console = Console(stderr=json, width=None if sys.stdout.isatty() else 120)
    began = time.monotonic()
    questions = list(samples("test", n, start=start))
    vlm = load(model, device=device or None, dtype=dtype)
    ways = [IMAGE, *RECIPES, *([SHORTEST] if has_profile(vlm.fingerprint) else [])]
    crossings: list[Crossing] = []
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        cloud_process(model, device, dtype) as address,
        Edge(vlm, cloud=address, uplink=uplink, deadline=60) as edge,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("crossing", total=len(ways) * n)
        for way in ways:
            progress.update(task, description=way)
            ask = partial(edge.ask, mode="image") if way == IMAGE else partial(edge.ask, recipe=way)
            if way != IMAGE:  # what a codec loads once does not count; a picture would be held
                ask(questions[0].images, questions[0].question)
            for sample in questions:
                answer = ask(sample.images, sample.question)
                crossings.append(Crossing(way, sample, answer, exact_match(answer.text, sample.answer)))
                progress.advance(task)
    featured = _featured(questions)
    rows = [_row(way, [c for c in crossings if c.way == way], featured) for way in ways]
    _draw(out, vlm, featured, rows, n)
    if json:
        print(jsonlib.dumps({"question": featured.question, "truth": featured.answer, "n": n, "rows": rows}))
        return
    title = f"{n} test questions over {uplink}/s, protocol A (ask, then ship), both ends hold {model}"
    note = (
        f'Answer shown: "{featured.question}" (truth: {featured.answer}). Bytes and times are means; '
        "bytes are all those of the TCP stream to the cloud. "
        f"{'A small model, drawn' if model in SHIPPED else 'Drawn'} scenes; full tables: RESULTS.md."
    )
    if into is not None:
        _write_into(into, rows, title, note, n)
    _print(console, rows, title, note, n)
    console.print(f"\nPicture: {out}   ({time.monotonic() - began:.0f} s in all)")


def _featured(questions: list[Sample]) -> Sample:
    """The question whose answer is printed: the first about one picture whose evidence can be pointed at."""
    return next((s for s in questions if len(s.images) == 1 and s.evidence_boxes), questions[0])


def _row(way: str, crossings: list[Crossing], featured: Sample) -> dict[str, Any]:
    """Means over all questions, and the featured one's answer."""
    n = len(crossings)
    shown = next(c for c in crossings if c.sample is featured)
    mean_bytes = sum(c.answer.wire_bytes_up or 0 for c in crossings) / n
    return {
        "way": way,
        "wire_bytes": mean_bytes,
        "ratio_to_bf16": sum(c.answer.bf16_bytes or 0 for c in crossings) / n / mean_bytes,
        "send_seconds": sum(c.answer.seconds.send for c in crossings) / n,
        "first_token_seconds": sum(c.answer.seconds.first_token for c in crossings) / n,
        "answer": shown.answer.text,
        "right": shown.right,
        "right_share": sum(c.right for c in crossings) / n,
    }


def _table(rows: list[dict[str, Any]], n: int) -> tuple[list[str], list[list[str]]]:
    """Column names and cells."""
    names = ["way", "bytes on the wire", "x smaller than BF16", "send ms", "first token ms", "its answer"]
    cells = [
        [
            row["way"],
            f"{row['wire_bytes']:,.0f}",
            f"{row['ratio_to_bf16']:.1f}" if row["ratio_to_bf16"] else "",
            f"{1e3 * row['send_seconds']:.0f}",
            f"{1e3 * row['first_token_seconds']:.0f}",
            f"{row['answer']} ({'right' if row['right'] else 'wrong'})",
            f"{row['right_share'] * n:.0f}",
        ]
        for row in rows
    ]
    return [*names, f"right of {n}"], cells


def _print(console: Console, rows: list[dict[str, Any]], title: str, note: str, n: int) -> None:
    table = Table(title=title, title_justify="left")
    names, cells = _table(rows, n)
    for name in names:
        left = name in ("way", "its answer")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for row in cells:
        table.add_row(*(escape(x) for x in row))
    console.print(table)
    console.print(note, highlight=False)


def _write_into(page: Path, rows: list[dict[str, Any]], title: str, note: str, n: int) -> None:
    """Replace what stands between the page's two demo marks."""
    text = page.read_text()
    before, opened, rest = text.partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not (opened and closed):
        raise InputError(
            f"{page} has no block between {MARKS[0]} and {MARKS[1]}; add the two lines where it should stand"
        )
    names, cells = _table(rows, n)
    lines = [names, ["---"] + ["---:"] * 4 + ["---", "---:"], *cells]
    table = "\n".join("| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines)
    write_whole(page, f"{before}{opened}\n{title}:\n\n{table}\n\n{note}\n{closed}{after}")


def _draw(out: Path, vlm: Any, featured: Sample, rows: list[dict[str, Any]], n: int) -> None:
    """The featured scene with the tokens each shown recipe keeps, beside the bars."""
    from kvferry.overlay import draw_crossing, kept_share
    from kvferry.recipe import compress, decompress

    shares = []
    for recipe in SHOWN:
        prefilled = vlm.prefill(featured.images, featured.question, recipe=recipe)
        shares.append((recipe, kept_share(decompress(compress(prefilled, recipe)))))
    bars = [(row["way"], row["wire_bytes"], row["right_share"]) for row in rows]
    caption = f"{featured.question} (truth: {featured.answer})"
    draw_crossing(out, featured.images[0], caption, shares, bars, n)
