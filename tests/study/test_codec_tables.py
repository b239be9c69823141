"""Codecs compared, and the headline, from small made-up raw results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvferry.codecs.profile import read as read_profile
from kvferry.evaluate.measured import SAME, Measured, Point, corrected
from kvferry.evaluate.records import Line, Outcome, Protocol
from kvferry.evaluate.tables import provenance_note
from study.codec_figures import LINES, PANELS, drawn, edge, finding, look
from study.codec_tables import (
    cliff_note,
    command_note,
    comparison_table,
    delta_pairs,
    integer_table,
    kept_table,
    lossless_note,
    p_text,
    render,
    retention_tables,
    rows_table,
    uniform_pairs,
)
from study.headline import chosen, first_of, profile_note, references, tuned
from study.headline import render as render_headline
from study.page import Places
from tests.evaluate.test_tables import write

ROWS: dict[str, tuple[int, int, float]] = {
    "full|bf16": (2000, 100, 0.0),
    "none|bf16": (150, 20, 3.0),
    "full|int8": (1000, 100, 0.001),
    "full|int4": (520, 99, 0.01),
    "full|int2": (260, 70, 0.9),
    "full|int4|zstd": (400, 99, 0.01),
    "full|mixed@m.json": (515, 100, 0.002),
    "full|svd:64": (900, 100, 0.001),
    "full|svd:16": (300, 96, 0.1),
    "full|svd:4": (90, 40, 2.0),
    "full|delta:10": (450, 97, 0.02),
    "full|delta:10,shallow=1,middle=2,deep=3": (260, 80, 0.2),
    "full|delta:0": (290, 96, 0.05),
    "full|delta:0,shallow=1,middle=2,deep=3": (250, 88, 0.1),
    "full|transform:64": (40, 99, 0.01),
    "full|transform:128": (20, 90, 0.1),
    "q2c@0.75|int8": (750, 97, 0.1),
    "q2c@0.75|int4": (390, 96, 0.1),
    "q2c@0.5|int4": (260, 80, 0.4),
    "image:90": (120, 99, 0.01),
    "image:30": (60, 99, 0.02),
    "image:10": (30, 85, 0.2),
    "embeds:int4": (70, 98, 0.05),
}
"""Row -> (bytes, right answers of 100, KL)."""


def lines(protocol: Protocol = "A", n: int = 100, rows: dict[str, tuple[int, int, float]] = ROWS) -> list[Line]:
    """Right on the first so many questions of a fixed shuffle, so that rows are nested; bytes differ a little."""
    return [
        Line(
            index=i, kind="digit" if i % 2 else "colour", protocol=protocol, bf16_bytes=2000 + i % 5, image_bytes=120,
            tokens=100,
            outcomes={
                row: Outcome(int(i * 37 % 100 < right), size + i % 3, kl) for row, (size, right, kl) in rows.items()
            },
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured(lines(), "A")


def report(recipe: str | None, **changes: Any) -> dict[str, Any]:
    winner = recipe and {"recipe": recipe}
    told = {"winner": winner, "target": 0.98, "protocol": "A", "split": "validation", "standings": [{"n": 540}]}
    return {**told, "command": "kvferry tune x", "commit": "1" * 40, "fingerprint": "f" * 64, **changes}


@pytest.mark.parametrize(
    ("row", "family", "stage"),
    [
        ("full|int3", "full|intB", "packed"),
        ("full|int3|zstd", "full|intB|zstd", "zstd"),
        ("full|int3,coder=range", "full|intB,coder=range", "range"),
        ("full|kivi:2", "full|kivi:B", "packed"),
        ("full|svd:8,bits=4", "full|svd:R,bits=4", "packed"),
        ("full|delta:0,shallow=1,middle=2,deep=3", "full|delta:0", "range"),
        ("full|mixed@testbed/cloud/mixed.json", "full|mixed", "packed"),
        ("leaveout@0.08,budget=shared|transform:64 proxy", "leaveout,budget=shared|transform:R proxy", "range"),
        ("image:30", "JPEG", ""),
        ("embeds:int4", "embeds", ""),
    ],
)
def test_families_and_stages(row: str, family: str, stage: str) -> None:
    assert (Point(row).family, Point(row).stage) == (family, stage)


def test_every_row_but_the_ends_is_in_one_family(measured: Measured) -> None:
    inside = [p.name for points in measured.families().values() for p in points]
    assert sorted(inside) == sorted(set(ROWS) - {"full|bf16", "none|bf16"})


def test_a_comparison_is_paired(measured: Measured) -> None:
    against = measured.compare("full|int2", "full|int8")
    assert against.difference.mean == pytest.approx(-0.3)
    assert against.words == "fewer right"
    assert against.p == pytest.approx(2 * 0.5**30)
    one = measured.compare("full|int4", "full|int8")
    assert (one.words, one.p) == (SAME, 1.0)
    assert measured.compare("full|int8", "full|int2").words == "more right"


def test_a_family_of_comparisons_is_corrected(measured: Measured) -> None:
    alone = [measured.compare(row, measured.full) for row in ("full|int4", "full|int2")]
    both = corrected(alone)
    assert [x.difference for x in both] == [x.difference for x in alone]
    assert [x.p for x in both] == [alone[0].p, pytest.approx(2 * alone[1].p)]
    rows = ("full|bf16", "full|svd:16", "full|svd:4", "full|int4")
    table = rows_table(measured, [Point(x) for x in rows]).splitlines()
    assert "p (Holm, 3)" in table[0]
    # Four wrong of a hundred: 2 / 16 alone, and it is the second least of three.
    assert "| 0.250 |" in table[3]


def test_kl_is_compared_question_by_question(measured: Measured) -> None:
    assert measured.kl_p("full|int4", "full|int4") == 1.0
    pairs = [("", Point("full|mixed@m.json"), Point("full|int4"))]
    p = measured.kl_p("full|mixed@m.json", "full|int4")
    assert p is not None
    assert p < 1e-9
    table = comparison_table(measured, pairs).splitlines()
    assert table[0].count("p (Holm, 1)") == 2
    assert "<0.001 | less harm" in table[2]


def test_ratios_are_of_means(measured: Measured) -> None:
    bf16 = np.mean([x.bf16_bytes for x in measured.lines])
    size = np.mean([x.outcomes["full|int4"][1] for x in measured.lines])
    shrink = measured.shrink("full|int4")
    assert shrink.mean == pytest.approx(bf16 / size)
    assert shrink.low < shrink.mean < shrink.high
    kl = measured.kl_ratio("full|mixed@m.json", "full|int4")
    assert kl is not None
    assert kl.mean == pytest.approx(0.2)
    assert measured.kl_ratio("full|int4", "full|bf16") is None


def test_old_files_without_kl_have_none() -> None:
    old = [replace(x, outcomes={k: Outcome(o[0], o[1]) for k, o in x.outcomes.items()}) for x in lines()]
    measured = Measured(old, "A")
    assert measured.kl("full|int4") is None
    assert measured.kl_p("full|int4", "full|int2") is None
    assert measured.kl_ratio("full|int4", "full|int2") is None
    assert rows_table(measured, [Point("full|int4")]).splitlines()[2].count("|") == 10


def test_pictures_stand_beside_protocol_b_too() -> None:
    caches = {k: v for k, v in ROWS.items() if not Point(k).mode}
    both = Measured(lines("A") + lines("B", 60, caches), "B")
    assert both.n == 60
    assert both.kl("image:30") is None
    assert both.accuracy("image:10").mean == pytest.approx(np.mean([i * 37 % 100 < 85 for i in range(60)]))
    assert "image:30" not in Measured(lines("B", 60, caches), "B").points


def test_the_smallest_of_a_family_is_measured_and_good_enough(measured: Measured) -> None:
    table = kept_table(measured).splitlines()
    best = {x.split(" | ")[0].strip("| `"): x.split(" | ")[1].strip("`") for x in table[2:]}
    assert best["full\\|transform:R"] == "full\\|transform:64"
    assert best["full\\|intB"] == "full\\|int4"
    assert best["JPEG"] == "image:30"
    assert best["q2c\\|intB"] == "none measured"
    assert table[2].startswith("| `full\\|transform:R`")
    assert measured.leaders(2) == ["full|transform:R", "full|intB|zstd"]


def test_mixed_is_held_against_integers_of_its_bytes(measured: Measured) -> None:
    pairs = {a.name: b.name for _, a, b in uniform_pairs(measured)}
    assert pairs["full|mixed@m.json"] == "full|int4"
    assert pairs["full|svd:64"] == "full|int8"
    assert pairs["full|delta:10"] == "full|int4|zstd"
    assert "full|transform:64" not in pairs
    assert "full|svd:4" not in pairs


def test_delta_is_held_against_direct_in_equal_steps_and_in_equal_bytes(measured: Measured) -> None:
    pairs = {(what, a.name): b.name for what, a, b in delta_pairs(measured)}
    assert pairs == {
        ("same steps", "full|delta:10"): "full|delta:0",
        ("same steps", "full|delta:10,shallow=1,middle=2,deep=3"): "full|delta:0,shallow=1,middle=2,deep=3",
    }
    longer = {**ROWS, "full|delta:0,shallow=0.2,middle=0.3,deep=0.5": (449, 99, 0.01)}
    pairs = {(what, a.name): b.name for what, a, b in delta_pairs(Measured(lines(rows=longer), "A"))}
    assert pairs["nearest bytes", "full|delta:10"] == "full|delta:0,shallow=0.2,middle=0.3,deep=0.5"


def test_the_cliff(measured: Measured) -> None:
    assert "16 to 4, -56.0 [" in cliff_note(measured)[0]
    few = {k: v for k, v in ROWS.items() if k not in ("full|svd:16", "full|svd:4")}
    assert cliff_note(Measured(lines(rows=few), "A")) == []


def test_retention_and_bits(measured: Measured) -> None:
    (table,) = (x for x in retention_tables(measured) if x.startswith("| tokens"))
    head, _, whole, most, half = table.splitlines()
    assert head == "| tokens kept | INT8 | INT4 |"
    assert whole.startswith("| 100% | 100.0 [100.0, 100.0] at 50.0% | 99.0 [")
    assert most.endswith("at 19.5% |")
    assert half.startswith("| 50% |  | 80.0 [")


def test_integers_show_what_lossless_stages_make_of_them(measured: Measured) -> None:
    head, _, *rows = integer_table(measured).splitlines()
    assert head.endswith("| bytes, zstd |")
    assert [row.split(" | ")[0] for row in rows] == ["| 8", "| 4", "| 2"]
    assert rows[1].endswith("| 401 |")
    assert "the same in all 100 pairs" in lossless_note(measured)[0]
    changed = [replace(x, outcomes={**x.outcomes, "full|int4|zstd": Outcome(0, 1, 0.01)}) for x in lines()]
    assert "differ in 99 of 100 pairs" in lossless_note(Measured(changed, "A"))[0]


def test_the_edge_of_a_family_only_gets_better(measured: Measured) -> None:
    points = [Point(f"full|svd:{rank}") for rank in (64, 16, 4)]
    worse = Measured(lines(rows={**ROWS, "full|svd:16": (300, 30, 3.0)}), "A")
    assert [p.name for p in edge(points, worse, worse.accuracy, 1)] == ["full|svd:4", "full|svd:64"]
    assert [p.name for p in edge(points, worse, worse.kl, -1)] == ["full|svd:4", "full|svd:64"]
    assert len(edge(points, measured, measured.accuracy, 1)) == 3


def test_a_panel_holds_at_most_seven_families_that_can_be_told_apart(measured: Measured) -> None:
    families = drawn(measured)
    assert {"JPEG", "embeds", "full|intB"} <= set(families)
    assert "full|intB|zstd" not in families
    assert len({look(f) for f in families}) == len(families) <= LINES
    assert look("full|transform:R")[0] == look("leaveout,budget=shared|transform:R")[0] != look("full|intB")[0]
    assert look("full|intB|zstd")[0] == look("full|intB")[0]


def test_the_title_is_the_finding(measured: Measured) -> None:
    best = measured.smallest_good([p for p in measured.points.values() if p.recipe and p.name != measured.full])
    assert best is not None
    assert finding(measured, PANELS[0]).startswith(
        f"{best.name.partition('|')[2]} holds 98% of full in {measured.bytes[best.name]:,.0f} bytes"
    )


def test_a_long_command_is_shortened_only_where_it_can_be_looked_up() -> None:
    head = {
        "command": "kvferry sweep --n 3 --recipe 'full|bf16' --recipe 'full|int4' --check forced",
        "commit": "0" * 40, "sweep": {"model": "m", "split": "test"}, "fingerprint": "f" * 64, "dtype": "bfloat16",
        "torch": "2", "transformers": "5", "machine": "a machine",
    }  # fmt: skip
    short = command_note(head, lines(), "[x](x.md)")
    assert "`kvferry sweep --n 3 --check forced --recipe ...`" in short
    assert short.endswith("The 2 recipes: [x](x.md).")
    assert command_note(head, lines()) == provenance_note(head, lines())
    assert p_text(0.0001) == "<0.001"


def pages(tmp_path: Path, *reports: dict[str, Any], rows: dict[str, tuple[int, int, float]] = ROWS) -> str:
    for i, told in enumerate(reports):
        (tmp_path / f"tune-x-{i}.json").write_text(json.dumps(told))
    places = Places(tmp_path / "RESULTS.md", tmp_path / "figures", tmp_path / "results")
    return render_headline(write(tmp_path / "headline-x.jsonl", lines(rows=rows)), places, "Title")


def test_the_headline_is_what_was_chosen_beforehand(measured: Measured, tmp_path: Path) -> None:
    reports = [report("full|int4", target=0.9), report("full|int8"), report("gone|int4", protocol="B")]
    page = pages(tmp_path, *reports)
    first = next(x for x in page.splitlines() if x.startswith("* "))
    assert first.startswith("* **`full|int8` (chosen on validation): 1,001 [1,001, 1,001] bytes a question, 2.0x")
    assert first.endswith("It keeps 98%, the whole interval does.")
    assert "* JPEG of quality 90: 121 bytes at 99.0 [" in page
    assert "* smallest JPEG at 98% of full: quality 30: 61 bytes at 99.0 [" in page
    assert page.count("the picture is smaller; recipe minus picture: 1.0 [0.0, 3.0] points") == 2
    assert "`full\\|int4` (chosen for 90%)" in page
    assert "gone|int4" not in page
    order = tuned(tmp_path, "f" * 64, "A")
    assert [x["target"] for x in order] == [0.98, 0.9]
    assert first_of(measured, chosen(measured, order)) == Point("full|int8")


def test_without_a_choice_beforehand_the_headline_says_so(tmp_path: Path) -> None:
    page = pages(tmp_path, report(None))
    assert "* `full|transform:64` (chosen on these very questions, so it flatters itself)" in page
    assert "**" not in page
    assert "found no recipe that surely keeps it" in page
    assert "a profile of unknown size" in page
    assert "the recipe is smaller" in page


def test_a_choice_that_falls_short_is_reported_beside_one_that_does_not(tmp_path: Path) -> None:
    page = pages(tmp_path, report("full|transform:128"))
    first, *_, last = (x for x in page.splitlines() if x.startswith("* "))
    assert first.startswith("* **`full|transform:128` (chosen on validation)")
    assert first.endswith("It falls short of the 98% it should keep on these questions.")
    assert last.startswith("* `full|transform:64` (chosen on these very questions")


def test_where_nothing_is_good_the_headline_says_so(tmp_path: Path) -> None:
    keep = ("full|bf16", "none|bf16", "image:10", "full|int2")
    page = pages(tmp_path, rows={k: v for k, v in ROWS.items() if k in keep})
    assert "No tuning of this model and protocol" in page
    assert "* No recipe here keeps 98% of the full cache's accuracy." in page
    assert "**" not in page


def test_the_reference_pictures(measured: Measured) -> None:
    assert [p.name for _, p in references(measured)] == ["image:90", "image:30"]


def test_a_shipped_profile_is_weighed() -> None:
    folder = Path(__file__).parents[2] / "testbed" / "cloud"
    fingerprint = json.loads((folder / "mixed.json").read_text())["fingerprint"]
    note = profile_note(fingerprint, [Point("full|transform:64"), Point("full|int4")])
    assert f"{len(read_profile(folder / 'transform.profile')[0].to_bytes()):,} bytes" in note
    assert profile_note(fingerprint, [Point("full|int4")]) == ""


def test_the_page_holds_every_row(tmp_path: Path) -> None:
    places = Places(tmp_path / "RESULTS.md", tmp_path / "figures", tmp_path / "results")
    raw = write(tmp_path / "codecs-x.jsonl", lines())
    text = render(raw, places, "Title")
    page = places.detail(raw).read_text()
    every = page.split("### Every row")[1]
    for row in ROWS:
        assert "`" + row.replace("|", "\\|") + "`" in every
    for block in (text, page):
        for table in block.split("\n\n"):
            if table.startswith("| "):
                widths = {line.replace("\\|", "").count("|") for line in table.splitlines()}
                assert len(widths) == 1, table
    assert places.figure(raw).is_file()
