"""Where a page of results and its figures go, and what they look like."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHOWN = 0.25
"""The fraction whose rows stand on the page of results itself."""


@dataclass(frozen=True)
class Places:
    """Where the page of results goes, its figures, and the pages with what is too long for it."""

    page: Path
    figures: Path
    details: Path

    def figure(self, results: Path) -> Path:
        """Of one raw file."""
        return self.figures / f"{results.stem}.png"

    def detail(self, results: Path) -> Path:
        """Of one raw file."""
        return self.details / f"{results.stem}.md"

    def link(self, target: Path) -> str:
        """How the page links to ``target``."""
        return Path(os.path.relpath(target, self.page.parent)).as_posix()


def write_detail(results: Path, places: Places, render: Callable[[Path, Places, str], str], title: str) -> None:
    """The page of one raw file: what its renderer says in short, then every row, if it writes a page of those."""
    page = places.detail(results)
    page.unlink(missing_ok=True)
    brief = render(results, Places(page, places.figures, places.details), title)
    everything = page.read_text().partition("\n## ")[2] if page.is_file() else ""
    lines = [line for line in brief.splitlines() if f"]({page.name})" not in line]
    text = "\n".join(lines).replace("\n### ", "\n## In short: ").replace("## ", "# ", 1)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text.rstrip() + "\n" + (f"\n## {everything.rstrip()}\n" if everything else ""))
