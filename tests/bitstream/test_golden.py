"""Streams written earlier still decode to the same numbers, and are still written alike."""

import json

import pytest

from kvferry.bitstream import Reader
from kvferry.bitstream.records import CHECKSUM
from kvferry.codecs import profile_store
from kvferry.recipe import compress, decompress
from tests.bitstream import golden


@pytest.mark.parametrize("name", golden.STREAMS)
def test_vectors_decode_as_recorded(name: str) -> None:
    blob = (golden.DATA / f"{name}.kvf").read_bytes()
    expected = json.loads((golden.DATA / "expected.json").read_text())
    assert golden.describe(decompress(blob)) == expected[name]


@pytest.mark.parametrize("name", [name for name in golden.STREAMS if "zstd" not in name])
def test_frames_are_written_as_recorded(name: str) -> None:
    blob = (golden.DATA / f"{name}.kvf").read_bytes()
    assert _bodies(compress(golden.cache(), *golden.STREAMS[name])) == _bodies(blob)


@pytest.mark.parametrize("name", golden.PROFILED)
def test_profiles_decode_what_was_coded_with_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of every kind and version of profile, and their streams; arithmetic is the machine's own."""
    monkeypatch.setattr(profile_store, "_known", {})
    profile_store.add(golden.DATA / f"{golden.PROFILED[name][0]}.profile")
    expected = json.loads((golden.DATA / "expected.json").read_text())[name]
    found = golden.decoded((golden.DATA / f"{name}.kvf").read_bytes())
    assert found.keys() == expected.keys()
    for key in ("recipe", "positions"):
        assert found[key] == expected[key]
    for key in ("first", "last", "norm", "error"):
        assert found[key] == pytest.approx(expected[key], rel=1 / 64, abs=1 / 64), key
    assert found["error"] < 0.5


def _bodies(blob: bytes) -> list[bytes]:
    """What the frames hold, without the header, whose zstd may change with the library, and the checksums after it."""
    reader = Reader()
    reader.feed(blob)
    bodies, start = [], reader.header_bytes
    for frame in reader.frames:
        bodies.append(blob[start : start + frame.total - CHECKSUM.size])
        start += frame.total
    return bodies
