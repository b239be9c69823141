"""NaN and infinity in a payload are refused by name, whatever the codec, behind checksums that are right."""

from __future__ import annotations

import pytest

from kvferry.bitstream import Reader
from kvferry.bitstream.records import Kind, parse
from kvferry.errors import BitstreamError, CorruptError
from kvferry.recipe import compress
from kvferry.wire import bitstream_pb2 as pb
from tests.bitstream.fuzz import closed, opened
from tests.helpers import cache, layout

SOURCE = cache(layout(text_before=2, rows=3, columns=4, question=4, tail=2), layers=2, heads=2, dim=8)
PLAIN = (
    "bf16", "fp8", "fp8,format=e5m2", "int2", "int4", "int8", "kivi:4", "kivi:2,residual=4", "turbo:2", "turbo:3.5",
    "apart,visual=fp8/int2", "svd:8",
)  # fmt: skip
CODED = ("int4,coder=range", "delta")
WORDS = {"NaN": b"\xff", "infinity": b"\x7f"}


def damaged(recipe: str, where: slice, octet: bytes) -> bytes:
    """A stream whose first payload is ``octet`` in one part, with the checksums of what it then is."""
    records = opened(compress(SOURCE, recipe))
    index = next(i for i, (kind, _) in enumerate(records) if kind == Kind.FRAME)
    frame = parse(pb.Frame, records[index][1])
    payload = bytearray(frame.payload)
    payload[where] = octet * len(payload[where])
    frame.payload = bytes(payload)
    records[index] = (Kind.FRAME, frame.SerializeToString())
    return closed(records)


@pytest.mark.parametrize("codec", PLAIN)
def test_a_payload_of_nothing_else(codec: str) -> None:
    with pytest.raises(CorruptError, match=r"NaN|infinit|matrix"):
        Reader().feed(damaged(f"full|{codec}", slice(None), WORDS["NaN"]))


@pytest.mark.parametrize("octet", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("codec", [*PLAIN, *CODED])
def test_in_any_part_of_it(codec: str, octet: bytes) -> None:
    """Never numbers that are none: either an error by name, or bytes that mean something else."""
    for part in range(12):
        reader = Reader()
        size = 40
        try:
            reader.feed(damaged(f"full|{codec}", slice(part * size, (part + 1) * size), octet))
        except BitstreamError:
            continue
        for layer in reader.layers.values():
            assert bool(layer.keys.isfinite().all())
            assert bool(layer.values.isfinite().all())
