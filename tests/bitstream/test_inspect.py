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
