"""Hostile bytes: always a :class:`BitstreamError`, never another exception, never a silently wrong cache.

``KVFERRY_FUZZ_SECONDS`` makes the random part run longer.
"""

import os
import random
import time
from collections.abc import Iterator

import pytest

from kvferry.bitstream.records import MAGIC, VERSION, Kind, decompress, record
from kvferry.errors import BitstreamError, TruncatedError
from kvferry.recipe import compress, compress_frames
from kvferry.recipe import decompress as restore
from tests.helpers import cache, layout

SECONDS = float(os.environ.get("KVFERRY_FUZZ_SECONDS", "5"))
SMALL = cache(layout(text_before=2, rows=2, columns=2, question=2, tail=2), layers=2, heads=2, dim=3)
RECIPES = [
    "full|bf16|zstd",
    "knorm@0.5|int4",
    "random@0.5|int3|zstd",
    "knorm@0.8,budget=head|kivi:2,residual=1",
    "full|turbo:2.5",
    "full|apart,visual=fp8/int2",
    "knorm@0.8,budget=head|int4",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_truncation_anywhere(recipe: str) -> None:
    blob = compress(SMALL, recipe)
    for stop in range(len(blob)):
        with pytest.raises(TruncatedError):
            restore(blob[:stop])


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_flipped_bit(recipe: str) -> None:
    blob = compress(SMALL, recipe)
    for place in range(len(blob)):
        for mask in (0x01, 0x08, 0x80, 0xFF):
            broken = bytearray(blob)
            broken[place] ^= mask
            with pytest.raises(BitstreamError):
                restore(bytes(broken))


def test_random_edits() -> None:
    rng = random.Random(0)
    blobs = [compress(SMALL, recipe) for recipe in RECIPES]
    for _ in _until(SECONDS / 2):
        broken = _edit(rng.choice(blobs), rng)
        if broken not in blobs:
            with pytest.raises(BitstreamError):
                restore(broken)


def test_random_edits_behind_valid_checksums() -> None:
    """Whoever writes hostile bytes writes their checksums too: decoding may then succeed, but not crash."""
    rng = random.Random(1)
    streams = [_bodies(recipe) for recipe in RECIPES]
    for _ in _until(SECONDS / 2):
        stream = list(rng.choice(streams))
        index = rng.randrange(len(stream))
        kind, body = stream[index]
        stream[index] = (kind, _edit(body, rng))
        blob = MAGIC + bytes([VERSION]) + b"".join(record(kind, body) for kind, body in stream)
        try:
            restore(blob)
        except BitstreamError:
            continue


def test_one_recipe_leaves_ragged_heads() -> None:
    assert any(layer.counts for layer in restore(compress(SMALL, RECIPES[-1])))


def _bodies(recipe: str) -> list[tuple[Kind, bytes]]:
    """The records of a stream, the header not compressed."""
    bodies = []
    for piece in compress_frames(SMALL, recipe):
        framed = piece[len(MAGIC) + 1 :] if piece.startswith(MAGIC) else piece
        kind, body = Kind(framed[0]), framed[5:-4]
        if kind == Kind.HEADER_ZSTD:
            kind, body = Kind.HEADER, decompress(body, 1 << 20)
        bodies.append((kind, body))
    return bodies


def _edit(blob: bytes, rng: random.Random) -> bytes:
    """One to four flips, insertions, deletions or copied pieces."""
    out = bytearray(blob)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(out) + 1)
        action = rng.randrange(4)
        if action == 0 and place < len(out):
            out[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif action == 1:
            out[place:place] = rng.randbytes(rng.randint(1, 6))
        elif action == 2:
            del out[place : place + rng.randint(1, 6)]
        else:
            start = rng.randrange(len(blob))
            out[place : place + 8] = blob[start : start + 8]
    return bytes(out)


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
