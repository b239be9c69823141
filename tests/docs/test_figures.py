"""Figures that pages quote are those of the results they name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.docs.figures import Quote, quotes, renew


@pytest.mark.parametrize("quote", [pytest.param(x, id=f"{x.page.name}:{x.line + 1}") for x in quotes()])
def test_figures_are_those_of_the_results(quote: Quote) -> None:
    assert quote.mine == quote.theirs, "new results? `python -m tests.docs.figures`, and read what is said about them"
    names = [row[0].strip("*`") for row in quote.mine]
    assert any(name.startswith("none") for name in names), "a table of figures has a floor"
    assert any(name.startswith("full") for name in names), "a table of figures has a ceiling"


def test_stale_figures_are_found_and_renewed(tmp_path: Path) -> None:
    quote = quotes()[0]
    stale = replace(quote, page=tmp_path / "page.md")
    text = quote.page.read_text(encoding="utf-8")
    stale.page.write_text(text.replace("0.", "7."), encoding="utf-8")
    assert stale.mine != quote.mine
    renew(stale)
    assert stale.mine == quote.theirs


def test_pages_of_results_name_no_machine_s_paths() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "RESULTS.md", *(root / "docs" / "results").glob("*.md")]
    assert len(pages) > 10
    for page in pages:
        for foreign in ("/tmp/", "/home/", "/root/", "**not measured**"):
            assert foreign not in page.read_text(encoding="utf-8"), f"{page} says {foreign!r}; run `make results`"
