"""Tables of figures that pages quote from ``docs/results``; ``python -m tests.docs.figures`` quotes them anew."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.docs.blocks import PAGES, ROOT

_MARK = re.compile(r"<!-- figures: ([\w/.-]+): (.+) -->")


@dataclass(frozen=True)
class Quote:
    """A marked table: the page, the line of its mark, and what it says that it quotes."""

    page: Path
    line: int
    source: str
    headings: tuple[str, ...]

    @property
    def mine(self) -> list[list[str]]:
        """The table's rows as they stand, without the line of dashes."""
        return table_at(lines_of(self.page), self.line)

    @property
    def theirs(self) -> list[list[str]]:
        """The same rows and columns as the results have them; a KeyError where they have no such row or column."""
        lines = lines_of(ROOT / "docs" / self.source)
        at = 0
        for heading in self.headings:
            at = 1 + next(i for i in range(at, len(lines)) if re.match(rf"#+ {re.escape(heading)}", lines[i]))
        head, *rows = table_at(lines, at)
        found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
        wanted, *mine = self.mine
        return [wanted, *([found[row[0]][column] for column in wanted] for row in mine)]


def lines_of(page: Path) -> list[str]:
    return page.read_text(encoding="utf-8").splitlines()


def table_at(lines: list[str], at: int) -> list[list[str]]:
    """Cells of the first table from line ``at`` on, without its line of dashes."""
    start = next(i for i in range(at, len(lines)) if lines[i].startswith("|"))
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[start:stop]]
    return rows[:1] + rows[2:]


def quotes() -> list[Quote]:
    """All of them, page by page."""
    return [
        Quote(page, number, mark[1], tuple(mark[2].split(" / ")))
        for page in PAGES
        for number, line in enumerate(lines_of(page))
        if (mark := _MARK.fullmatch(line))
    ]


def renew(quote: Quote) -> None:
    """Write the results' figures into the page's table."""
    lines = lines_of(quote.page)
    start = next(i for i in range(quote.line, len(lines)) if lines[i].startswith("|"))
    for offset, row in enumerate(quote.theirs[1:], start=2):
        lines[start + offset] = f"| {' | '.join(row)} |"
    quote.page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for one in quotes():
        renew(one)
