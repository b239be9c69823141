"""``kvferry diagnose``: a profile for the codec ``mixed@FILE``."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvferry.cli.console import Device, Dtype, Model, NamedModel, model_of, print_json, typed, waiting
from kvferry.cli.questions import Images, Instruction, OldData, questions_of
from kvferry.errors import InputError
from kvferry.files import write_whole

if TYPE_CHECKING:
    from kvferry.analyze import Questions
    from kvferry.fit.diagnose import Allocation, Diagnosis
    from kvferry.models import VLM

DRAWN = 270
TRIED = 4


def diagnose(
    model: Model = "",
    named: NamedModel = "",
    bits: Annotated[
        int | None, typer.Option(help=f"What the recipe tries on every layer; {TRIED} by default.", min=1, max=8)
    ] = None,
    bytes_per_token: Annotated[
        float | None,
        typer.Option(help="Instead: the best widths for so many, by layer, keys and values, modality.", min=0),
    ] = None,
    data: OldData = None,
    images: Images = None,
    instruction: Instruction = "",
    split: Annotated[str, typer.Option(help="Without --data: a split of the testbed.")] = "calibration",
    n: Annotated[
        int | None, typer.Option(help=f"How many questions; all of a file, or {DRAWN} drawn ones.", min=1)
    ] = None,
    check: Annotated[
        int, typer.Option(help="So many validation questions of the testbed compare the profile with INT8 to 2.", min=0)
    ] = 0,
    out: Annotated[Path, typer.Option(help="Where the profile goes, for the codec mixed@FILE.")] = Path("mixed.json"),
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the profile as one JSON object.")] = False,
) -> None:
    """Find the layers that suffer from few bits, and write the widths that follow as a profile."""
    model = model_of(model, named)
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write the profile to; make it first")
    from kvferry.codecs import Mixed, codec_text

    codec = codec_text(Mixed(str(out)))
    if bits is not None and bytes_per_token is not None:
        raise InputError("--bits belongs to the sources' recipe; leave it out with --bytes-per-token")
    if check and data is not None:
        raise InputError("--check asks questions of the testbed; leave it out with --data")
    with waiting(f"loading {model}", json):
        from kvferry.evaluate.sweep import provenance
        from kvferry.fit.diagnose import Diagnosis, bits_of
        from kvferry.models import load

        asked = questions_of(data, images, split, n, DRAWN, instruction, json)
        vlm = load(model, device=device or None, dtype=dtype)
    found = _find(vlm, asked, bits or TRIED, bytes_per_token)
    profile: dict[str, Any] = {
        **provenance(vlm),
        "bits": bits_of(found.plan),
        "questions": asked.label,
        "n": asked.total,
        "command": typed(),
        **found.as_dict(),
    }
    _write(out, profile)
    if check:
        profile["check"] = _check(vlm, codec, check)
        _write(out, profile)
    if json:
        print_json(profile | {"out": str(out)})
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(found.words, markup=False)
    for table in [_by_layer(found)] if isinstance(found, Diagnosis) else [_by_part(found), _together(found)]:
        console.print(table)
    if check:
        console.print(_compared(profile["check"]))
    console.print(f"written to {out}; use it as full|{codec}", markup=False)


def _find(vlm: VLM, asked: Questions, bits: int, bytes_per_token: float | None) -> Diagnosis | Allocation:
    """The recipe's widths, or the best ones within the budget, behind a bar on a terminal."""
    from kvferry.fit.diagnose import diagnose as follow_recipe
    from kvferry.fit.diagnose import spend

    with _progress() as progress:
        passes = 1 if bytes_per_token is None else 2
        task = progress.add_task("asking", total=passes * asked.total)
        if bytes_per_token is None:
            return follow_recipe(vlm, asked.each, bits, lambda: progress.advance(task))
        return spend(vlm, asked.each, bytes_per_token, lambda: progress.advance(task))


def _check(vlm: VLM, codec: str, n: int) -> list[dict[str, Any]]:
    """The profile and uniform widths on ``n`` validation questions, by way of real bitstreams."""
    from kvferry.analyze.source import drawn_questions
    from kvferry.fit.damage import compare
    from kvferry.fit.diagnose import UNIFORM, comparison

    recipes = ["full|bf16", *(f"full|int{width}" for width in UNIFORM), f"full|{codec}"]
    with _progress() as progress:
        asked = progress.track(drawn_questions("validation", n).each(), total=n, description="checking")
        return comparison(recipes, compare(vlm, asked, recipes))


def _write(out: Path, profile: dict[str, Any]) -> None:
    try:
        write_whole(out, jsonlib.dumps(profile, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another --out") from None


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in ("recipe", "widths") else "right", no_wrap=True)
    return table


def _by_layer(found: Diagnosis) -> Table:
    """One line per layer, one for all of them."""
    losses, lost = found.damage.losses, found.damage.divergence.mean(0)
    right, n = found.damage.full.mean(), len(found.damage.full)
    table = _table(f"INT{found.bits} alone, n = {n}, full {right:.1%}", "layer", "own loss", "KL", "bits")
    for layer, widths in enumerate(found.plan):
        mark = " *" if layer in found.bottlenecks else ""
        table.add_row(f"{layer}{mark}", f"{losses[1 + layer]:.1%}", f"{lost[1 + layer]:.5f}", str(widths[0]))
    table.add_section()
    table.add_row("all", f"{losses[0]:.1%}", f"{lost[0]:.5f}", "")
    return table


def _by_part(found: Allocation) -> Table:
    """Widths of every layer's parts, each with the KL of that part alone."""
    from kvferry.codecs.mixed import PARTS
    from kvferry.fit.diagnose import CHOICES

    names = [part.replace("_", " ") for part in PARTS]
    table = _table("bits (KL alone)", "layer", *names)
    for layer, widths in enumerate(found.plan):
        cells = [f"{bits} ({found.cells[layer, part, CHOICES.index(bits)]:.5f})" for part, bits in enumerate(widths)]
        table.add_row(str(layer), *cells)
    return table


def _together(found: Allocation) -> Table:
    """What the parts' own damage adds up to, and what is measured; how much each freedom is worth."""
    n, right = len(found.measured.full), found.measured.full.mean()
    title = f"all parts together, n = {n}, full {right:.1%}"
    table = _table(title, "widths", "sum of parts' KL", "measured KL", "accuracy", "bytes a token")
    for row in found.as_dict()["together"]:
        figures = f"{row['predicted']:.5f}", f"{row['measured']:.5f}", f"{row['accuracy']:.1%}"
        table.add_row(row["widths"], *figures, f"{row['bytes_per_token']:.1f}")
    return table


def _compared(rows: list[dict[str, Any]]) -> Table:
    """One line per recipe."""
    table = _table(
        f"validation, protocol A, n = {rows[0]['n']} [95 %]", "recipe", "accuracy", "% of full", "KL (nats)", "bytes"
    )
    for row in rows:
        share, low, high = (f"{100 * x:.1f}" for x in row["of_full"])
        lost = [f"{x:.5f}" for x in row["divergence"]]
        table.add_row(
            escape(row["recipe"]),
            f"{row['accuracy']:.3f}",
            escape(f"{share} [{low}, {high}]"),
            escape(f"{lost[0]} [{lost[1]}, {lost[2]}]"),
            f"{row['bytes']:,.0f}",
        )
    return table
