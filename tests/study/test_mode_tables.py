"""The table of modes from made-up points."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry import InputError
from kvferry.policy import OperatingPoint, PointTable, write_points
from study.__main__ import app
from study.mode_tables import beside_the_sources, modes_table, render
from study.page import Places


def point(mode: str, quality: float, nbytes: int, **more: object) -> OperatingPoint:
    ends = max(0.0, quality - 0.03), min(1.0, quality + 0.03)
    return OperatingPoint(mode, quality, nbytes, 0.01, 0.002, 0.003, 0.04, n=200, interval=ends, **more)  # type: ignore[arg-type]


SOURCES = (
    point("kv:full|bf16", 0.9, 9_700_000),
    point("kv:full|int8", 0.9 * 0.994, 4_700_000),
    point("kv:full|mixed@a/b.json", 0.9 * 0.936, 2_600_000),
    point("kv:full|int4", 0.9 * 0.687, 2_300_000),
)
OTHERS = (
    point("image", 0.9, 14_000, needs=("pixels",), prefill_seconds=0.03),
    point("image", 0.9, 90, needs=("pixels", "held_picture"), prefill_seconds=0.03),
    point("kv:none|bf16", 0.2, 20_000),
)


def test_beside_the_sources() -> None:
    said = beside_the_sources(SOURCES)
    assert "`kv:full|int4` 4.2x smaller at 68.7 % of full (sources 4.2x, 68.7 %)" in said
    milder = [*SOURCES[:3], point("kv:full|int4", 0.9, 4_850_000)]
    assert "`kv:full|int4` 2.0x smaller at 100.0 % of full (sources 4.2x, 68.7 %)" in beside_the_sources(milder)
    assert beside_the_sources(OTHERS) == ""


def test_table() -> None:
    lines = modes_table([*SOURCES, *OTHERS]).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines[2:]}
    assert (
        "| 100.0 | 9,700,000 | 1.0x | 7,760.0 | 776.0 | 12 | 43 | no | neither |" in rows["`kv:full\\|bf16` (ceiling)"]
    )
    assert "| 11.2 | 1.1 |" in rows["`image`"]
    assert "| yes, 75% of its ms | pixels |" in rows["`image`"]
    assert "| 90 |" in rows["`image`, picture held"]
    assert "`kv:none\\|bf16` (floor: no visual token)" in rows


def test_section(tmp_path: Path) -> None:
    raw = tmp_path / "points-cloud.json"
    write_points((PointTable("a to b", (*SOURCES, *OTHERS), "kvferry profile --n 200: share of right answers"),), raw)
    text = render(raw, Places(tmp_path / "R.md", tmp_path, tmp_path), "Every mode")
    assert text.startswith("## Every mode\n\na to b. Made by `kvferry profile --n 200`: share of right answers.")
    assert "Protocol A" in text
    assert beside_the_sources(SOURCES) in text


def test_prefill_is_a_part_of_the_clouds_time() -> None:
    with pytest.raises(InputError, match="part of cloud_seconds"):
        point("image", 0.9, 1, prefill_seconds=0.05)


def test_results_finds_points(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_points((PointTable("a to b", OTHERS, "kvferry profile: n"),), tmp_path / "raw" / "points-edge.json")
    words = ["--raw", tmp_path / "raw", "--out", tmp_path / "R.md", "--figures", tmp_path, "--details", tmp_path]
    done = CliRunner().invoke(app, ["results", *map(str, words)])
    assert done.exit_code == 0, done.output
    title = "Every mode: bytes, quality, time, with the edge model on the edge"
    assert f"* [{title}](points-edge.md)" in (tmp_path / "R.md").read_text()
    assert (tmp_path / "points-edge.md").read_text().startswith(f"# {title}\n")
