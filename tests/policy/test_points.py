"""Operating points: files that come back, files that are refused, and the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.errors import InputError
from kvferry.policy import OperatingPoint, PointTable, read_points, write_points


def test_a_table_comes_back(tmp_path: Path) -> None:
    table = PointTable(
        "mine",
        (
            OperatingPoint("image", 0.9, 250_000, cloud_seconds=0.4, needs=("pixels",)),
            OperatingPoint("kv:q2c@0.25|int4", 0.8, 70_000, 0.1, 0.02, 0.03, 0.04),
            OperatingPoint("kv:full|int4", 0.9, 90_000, n=30, tiers=8, anytime=((0.2, 0.5), (0.3, 0.4), (0.6, 0.85))),
            OperatingPoint("local", 0.5, 0, edge_seconds=0.3),
        ),
        "measured with a command",
    )
    write_points((table,), tmp_path / "points.json")
    assert read_points(tmp_path / "points.json") == (table,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OperatingPoint("telepathy", 1.0, 1),
        lambda: OperatingPoint("image", -0.1, 1),
        lambda: OperatingPoint("image", float("nan"), 1),
        lambda: OperatingPoint("image", 1.0, -1),
        lambda: OperatingPoint("image", 1.0, 1, cloud_seconds=float("inf")),
        lambda: OperatingPoint("local", 1.0, 1),
        lambda: OperatingPoint("image", 1.0, 1, needs=("luck",)),
        lambda: OperatingPoint("kv", 1.0, 1, tiers=0),
        lambda: OperatingPoint("image", 1.0, 1, tiers=2),
        lambda: OperatingPoint("image", 1.0, 1, anytime=((0.5, 0.5),)),
        lambda: OperatingPoint("kv", 1.0, 1, anytime=((0.5, 0.5), (0.5, 0.6))),
        lambda: OperatingPoint("kv", 1.0, 1, anytime=((0.0, 0.5),)),
        lambda: OperatingPoint("kv", 1.0, 1, anytime=((1.0, 0.5),)),
        lambda: OperatingPoint("kv", 1.0, 1, anytime=((0.5, float("nan")),)),
        lambda: PointTable("empty", ()),
        lambda: PointTable("twice", (OperatingPoint("image", 1.0, 1), OperatingPoint("image", 0.5, 2))),
    ],
)
def test_points_that_cannot_be(make) -> None:
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"format": "kvferry-points/1"}',
        '{"format": "kvferry-points/1", "tables": {"a": {}}}',
        '{"format": "kvferry-points/1", "tables": {"a": {"points": [{"mode": "image"}]}}}',
        '{"format": "kvferry-points/1", "tables": {"a": {"points": [{"mode": "image", "quality": "x", "bytes": 1}]}}}',
        '{"format": "kvferry-points/1", "tables": {"a": {"points": [{"mode": "kv", "quality": 1, "bytes": 1, "x": 1}]}}}',  # noqa: E501
        '{"format": "kvferry-points/1", "tables": {"a": {"points": [{"mode": "kv", "quality": 1, "bytes": 1, "anytime": 1}]}}}',  # noqa: E501
        '{"format": "kvferry-points/9", "tables": {}}',
    ],
)
def test_files_that_hold_no_points(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=r"bad\.json"):
        read_points(tmp_path / "bad.json")


def test_no_such_file() -> None:
    with pytest.raises(InputError, match="scout-paper"):
        read_points("nowhere")


def test_the_published_points_and_what_is_derived_from_them() -> None:
    tables = {table.name: table for table in read_points("scout-paper")}
    theirs = {point.mode: (point.nbytes, point.quality) for point in tables["qwen-7b"].points}
    assert theirs == {
        "kv:full|bf16": (9_700_000, 1.0),
        "kv:full|int8": (4_700_000, 0.994),
        "kv:full|mixed": (2_600_000, 0.936),
        "kv:full|int4": (2_300_000, 0.687),
    }
    per_token = {"qwen-3b": 36 * 2, "qwen-14b": 48 * 8, "mistral-7b": 32 * 8}
    for name, heads in per_token.items():
        assert "not published" in tables[name].source
        for point in tables[name].points:
            assert point.nbytes == round(theirs[point.mode][0] * heads / (28 * 4))
    assert json.dumps(tables["qwen-7b"].source).count("Theirs") == 1
