"""``kvferry inspect``."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvferry.cli.inspect import inspect
from kvferry.errors import InputError, TruncatedError
from tests.bitstream import golden

FILE = golden.DATA / "knorm-int3-zstd.kvf"


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(inspect)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})
    if result.exception:
        raise result.exception
    return result.stdout


def test_people_see_where_the_bytes_went() -> None:
    text = run(str(FILE))
    for word in ("knorm@0.25|int3|zstd", "golden", "20 of them visual", "layer 0", "layer 1", "header", "trailer"):
        assert word in text
    assert "layout.token_ids" in text
    assert "by tier" not in text


def test_tiers_and_layers_are_summed_up() -> None:
    name = golden.DATA / "knorm-int2-tiers.kvf"
    text = run(str(name))
    for word in ("by tier", "by layer", "layer 1, tier 2"):
        assert word in text
    report = json.loads(run(str(name), "--json"))
    frames = sum(frame["entries"] for frame in report["frames"])
    for shares, count in ((report["by_tier"], 3), (report["by_layer"], 2)):
        assert len(shares) == count
        assert sum(share["total"] for share in shares) == (
            report["total_bytes"] - report["header_bytes"] - report["trailer_bytes"]
        )
        assert sum(share["entries"] for share in shares) == frames
    assert sum(report["header"].values()) == report["header_bytes"]


def test_scripts_get_one_object() -> None:
    report = json.loads(run(str(FILE), "--json"))
    assert report["total_bytes"] == FILE.stat().st_size
    assert [frame["layer"] for frame in report["frames"]] == [0, 1]
    assert report["payload_bytes"] + report["overhead_bytes"] == report["total_bytes"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        run(str(tmp_path))
    cut = tmp_path / "cut.kvf"
    cut.write_bytes(FILE.read_bytes()[:-3])
    with pytest.raises(TruncatedError, match="have it sent again"):
        run(str(cut))
