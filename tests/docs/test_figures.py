"""Figures that pages quote are those of the results they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT

_MARK = re.compile(r"<!-- figures: ([\w/.-]+): (.+) -->")
Table = dict[str, dict[str, str]]


def table_at(lines: list[str], at: int) -> Table:
    """The first table from line ``at`` on: rows by their first cell, cells by the head of their column."""
    at = next(i for i in range(at, len(lines)) if lines[i].startswith("|"))
    rows = []
    while at < len(lines) and lines[at].startswith("|"):
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", lines[at])[1:-1]])
        at += 1
    head, _, *body = rows
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def section(lines: list[str], headings: list[str]) -> int:
    """The line behind the last of ``headings``, each of which begins a heading below the one before."""
    at = 0
    for heading in headings:
        at = 1 + next(i for i in range(at, len(lines)) if re.match(rf"#+ {re.escape(heading)}", lines[i]))
    return at


def quoted() -> list[tuple[Path, int, str, list[str]]]:
    """Every marked table: its page, its line, the page of results and the headings there."""
    return [
        (page, number, mark[1], mark[2].split(" / "))
        for page in PAGES
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines())
        if (mark := _MARK.fullmatch(line))
    ]


@pytest.mark.parametrize(
    ("page", "line", "source", "headings"),
    [pytest.param(*x, id=f"{x[0].name}:{x[1] + 1}") for x in quoted()],
)
def test_figures_are_those_of_the_results(page: Path, line: int, source: str, headings: list[str]) -> None:
    mine = table_at(page.read_text(encoding="utf-8").splitlines(), line)
    lines = (ROOT / "docs" / source).read_text(encoding="utf-8").splitlines()
    theirs = table_at(lines, section(lines, headings))
    for name, row in mine.items():
        assert row == {column: theirs[name][column] for column in row}, name
    floors = [name for name in mine if name.startswith(("**none**", "`none"))]
    ceilings = [name for name in mine if name.startswith(("**full**", "`full"))]
    assert floors, "a table of figures has a floor"
    assert ceilings, "a table of figures has a ceiling"
