"""``kvferry inspect``."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import kvferry
from kvferry.bitstream import Reader, report
from kvferry.cli.inspect import inspect
from kvferry.errors import CorruptError, InputError, TruncatedError
from kvferry.summary import summarise_cache
from tests.bitstream import golden
from tests.codecs.test_not_finite import WORDS, damaged

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
    found = json.loads(run(str(name), "--json"))
    frames = sum(frame["entries"] for frame in found["frames"])
    for shares, count in ((found["by_tier"], 3), (found["by_layer"], 2)):
        assert len(shares) == count
        assert sum(share["total"] for share in shares) == (
            found["total_bytes"] - found["header_bytes"] - found["trailer_bytes"]
        )
        assert sum(share["entries"] for share in shares) == frames
    assert sum(found["header"].values()) == found["header_bytes"]


def test_scripts_get_one_object() -> None:
    found = json.loads(run(str(FILE), "--json"))
    assert found["total_bytes"] == FILE.stat().st_size
    assert [frame["layer"] for frame in found["frames"]] == [0, 1]
    assert found["payload_bytes"] + found["overhead_bytes"] == found["total_bytes"]


@pytest.mark.parametrize("name", golden.STREAMS)
def test_decoding_shows_nothing_else(name: str) -> None:
    blob = (golden.DATA / f"{name}.kvf").read_bytes()
    plain = report.inspect(blob)
    assert plain == report.inspect(blob, decode=True)
    assert plain.kept == summarise_cache(kvferry.decompress(blob))


def test_what_only_decoding_finds() -> None:
    blob = damaged("full|bf16", slice(0, 2), WORDS["NaN"])
    assert report.inspect(blob).total_bytes == len(blob)
    with pytest.raises(CorruptError, match="NaN"):
        report.inspect(blob, decode=True)
    reader = Reader(decode=False)
    reader.feed(blob)
    assert reader.complete
    with pytest.raises(InputError, match="decode="):
        reader.cache()


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        run(str(tmp_path))
    cut = tmp_path / "cut.kvf"
    cut.write_bytes(FILE.read_bytes()[:-3])
    with pytest.raises(TruncatedError, match="have it sent again"):
        run(str(cut))
