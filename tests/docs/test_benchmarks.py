"""BENCHMARKS.md says what the results say."""

from __future__ import annotations

from benchmarks.report import PAGE, page


def test_sections_are_made_of_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run: python -m benchmarks.report"
