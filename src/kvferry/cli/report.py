"""``kvferry report``: raw results as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.console import Device, Dtype, console, waiting
from kvferry.errors import KVFerryError

if TYPE_CHECKING:
    from kvferry.evaluate.report import Sheet, Shown


def report(
    places: Annotated[
        list[Path] | None, typer.Argument(help="Results of `kvferry sweep` or `eval`: files, or folders; results.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    pictures: Annotated[int, typer.Option(help="Drawn scenes on which to show what stays.", min=0)] = 2,
    recipe: Annotated[
        list[str] | None, typer.Option(help="What to show there; by default the smallest good ones. Repeatable.")
    ] = None,
    device: Device = "",
    dtype: Dtype = "auto",
) -> None:
    """Make one self-contained HTML page from raw results: fronts to hover over, tables, kept tokens, provenance."""
    from kvferry.evaluate.report import results_files, sheets, write_report

    files = results_files(places or [Path("results")])
    with waiting(f"reading {len(files)} file(s)"):
        found = [sheet for file in files for sheet in sheets(file)]
    shown = _shown(found, recipe, pictures, device, dtype) if pictures else []
    write_report(found, out, shown)
    print(f"wrote {out} from {len(files)} file(s)")


def _shown(found: list[Sheet], recipes: list[str] | None, pictures: int, device: str, dtype: str) -> list[Shown]:
    """Pictures by the model of the first drawn scenes under protocol A; none where it cannot be loaded."""
    from kvferry.evaluate.report import good_recipes, kept_pictures
    from kvferry.models import load
    from kvferry.testbed import samples

    sheet = next((x for x in found if x.protocol == "A" and x.split), None)
    chosen = recipes or (good_recipes(sheet) if sheet else [])
    if sheet is None or not chosen:
        return []
    try:
        with waiting(f"drawing what {sheet.origin['model']} keeps"):
            vlm = load(sheet.origin["model"], device=device or None, dtype=dtype)
            return list(kept_pictures(vlm, samples(sheet.split, pictures), chosen))
    except KVFerryError as error:
        console().print(f"no pictures of what stays: {error}")
        return []
