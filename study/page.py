"""Where a page of results and its figures go, and what they look like."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6A2F")
"""Okabe and Ito's colours, which all eyes tell apart, but for yellow, which is too faint on white, and a brown."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FAINT = "#bdbdbd"
"""For what is drawn beside those."""
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
