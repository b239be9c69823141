"""Stored raw results as one HTML file that needs nothing else: fronts to hover over, tables, kept tokens, origins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kvferry.errors import InputError
from kvferry.evaluate.records import kind_of
from kvferry.evaluate.report.front import Sheet, good_recipes, sheets
from kvferry.evaluate.report.kept import Shown, kept_pictures
from kvferry.evaluate.tables import CAVEAT
from kvferry.files import write_whole

__all__ = ["Sheet", "Shown", "good_recipes", "kept_pictures", "render", "results_files", "sheets", "write_report"]

HERE = Path(__file__).parent


def results_files(places: Sequence[Path]) -> list[Path]:
    """The raw files among ``places``, and those in folders among them, by name.

    In a folder, files that are no results of a sweep or an evaluation are passed over.

    Raises
    ------
    InputError
        One of them is not there, or there is none.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += [file for file in sorted(place.glob("*.jsonl")) if kind_of(file)]
        elif place.is_file():
            found.append(place)
        else:
            raise InputError(f"there is nothing at {place}; name a folder or a file of `kvferry sweep --out`")
    if not found:
        raise InputError(f"no raw results in {', '.join(map(str, places))}; `kvferry sweep --out FILE` makes them")
    return found


def render(found: Sequence[Sheet], shown: Sequence[Shown] = ()) -> str:
    """The report as HTML: styles, script, data and pictures are in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    data = json.dumps([x.as_dict() for x in found], separators=(",", ":")).replace("<", "\\u003c")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        sheets=found, data=data, shown=shown, caveat=CAVEAT if all(x.ships for x in found) else ""
    )


def write_report(found: Sequence[Sheet], path: Path, shown: Sequence[Shown] = ()) -> None:
    """Write the report.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    try:
        write_whole(path, render(found, shown))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place for the report") from None
