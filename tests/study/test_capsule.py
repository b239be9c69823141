"""The page on capsules, from made-up answers."""

from __future__ import annotations

from pathlib import Path

from kvferry.evaluate.measured import Measured
from study import capsule
from study.claims.capsule import ROW
from study.page import Places
from tests.evaluate.test_tables import write
from tests.study.test_claims import lines


def rows() -> dict[str, tuple[int, int]]:
    """Every recipe: (bytes, right answers of 100); the capsule of 40 % loses 10, as many evicted tokens none."""
    found = dict.fromkeys(capsule.RECIPES, (400, 100))
    return found | {"full|bf16": (1000, 100), "none|bf16": (50, 20), ROW: (400, 90), "full|capsule:0.4": (200, 90),
                    "full|svd:16": (190, 100), "full|transform:64": (10, 100)}  # fmt: skip


def test_what_is_held_against_what() -> None:
    measured = Measured(lines(rows()), "A")
    pairs = capsule.pairs_of(measured)
    assert {name for name, *_ in pairs["Is asymmetry needed?"]} == set(capsule.VARIANTS)
    assert [b.name for _, a, b in pairs["Against evicting"] if a.name == ROW] == [
        capsule.EVICTED[0.4], capsule.EVICTED[0.4].replace("leaveout", "random"),
    ]  # fmt: skip
    near = pairs["Against other codecs, the row of nearest bytes"]
    assert ("full|capsule:0.4", "full|svd:16") in [(a.name, b.name) for _, a, b in near]


def test_the_page(tmp_path: Path) -> None:
    raw = tmp_path / "capsule-cloud.jsonl"
    write(raw, lines(rows()))
    text = capsule.render(raw, Places(tmp_path / "R.md", tmp_path, tmp_path), "A capsule")
    assert text.startswith("## A capsule\n")
    (row,) = [line for line in text.splitlines() if line.startswith("| `" + ROW.replace("|", "\\|") + "`")]
    assert "0.900" in row
    assert "fewer right" in row
    assert "2.5x" in row
    page = (tmp_path / "capsule-cloud.md").read_text()
    assert "### Is asymmetry needed?" in page
    assert page.count("(both by networks)") == 1
