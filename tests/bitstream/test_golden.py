"""Streams written earlier still decode to the same numbers, and are still written alike."""

import json

import pytest

from kvferry.bitstream import Reader
from kvferry.recipe import compress, decompress
from tests.bitstream import golden


@pytest.mark.parametrize("name", golden.RECIPES)
def test_vectors_decode_as_recorded(name: str) -> None:
    blob = (golden.DATA / f"{name}.kvf").read_bytes()
    expected = json.loads((golden.DATA / "digests.json").read_text())
    assert golden.digest(decompress(blob)) == expected[name]


@pytest.mark.parametrize("name", [name for name in golden.RECIPES if "zstd" not in name])
def test_frames_are_written_as_recorded(name: str) -> None:
    blob = (golden.DATA / f"{name}.kvf").read_bytes()
    again = compress(golden.cache(), golden.RECIPES[name])
    assert _frames(again) == _frames(blob)


def _frames(blob: bytes) -> bytes:
    """Everything after the header, whose zstd may change with the library, and before the trailer that sums it up."""
    reader = Reader()
    reader.feed(blob)
    return blob[reader.header_bytes : reader.header_bytes + sum(frame.total for frame in reader.frames)]
