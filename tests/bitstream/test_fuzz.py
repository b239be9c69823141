"""Hostile bytes: always a :class:`BitstreamError`, never another exception, never a silently wrong cache.

``KVFERRY_FUZZ_SECONDS`` makes the random part run longer; ``python -m tests.bitstream.fuzz`` does so and counts.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from kvferry.errors import BitstreamError, TruncatedError
from kvferry.recipe import compress
from kvferry.recipe import decompress as restore
from tests.bitstream import fuzz

SECONDS = float(os.environ.get("KVFERRY_FUZZ_SECONDS", "5"))
BLOBS = [compress(fuzz.SMALL, recipe, tiers) for recipe, tiers in fuzz.STREAMS]


@pytest.mark.parametrize("blob", BLOBS, ids=[recipe for recipe, _ in fuzz.STREAMS])
def test_truncation_anywhere(blob: bytes) -> None:
    for stop in range(len(blob)):
        with pytest.raises(TruncatedError):
            restore(blob[:stop])


@pytest.mark.parametrize("blob", BLOBS, ids=[recipe for recipe, _ in fuzz.STREAMS])
def test_any_flipped_bit(blob: bytes) -> None:
    for place in range(len(blob)):
        for mask in (0x01, 0x08, 0x80, 0xFF):
            broken = bytearray(blob)
            broken[place] ^= mask
            with pytest.raises(BitstreamError):
                restore(bytes(broken))


def test_random_edits() -> None:
    rng = random.Random(0)
    for _ in _until(SECONDS / 2):
        broken = fuzz.edit(rng.choice(BLOBS), rng)
        if broken not in BLOBS:
            with pytest.raises(BitstreamError):
                restore(broken)


def test_hostile_streams_behind_valid_checksums() -> None:
    """Whoever writes hostile bytes writes their checksums too: decoding may then succeed, but not crash."""
    sources, ends = fuzz.hostile(seed=1), Counter[str]()
    for _ in _until(SECONDS / 2):
        _, blob, rng = next(sources)
        ends[fuzz.read(blob, rng)] += 1
    assert {"CorruptError", "TruncatedError", "decoded"} <= ends.keys()


def test_records_are_taken_apart_and_put_together() -> None:
    for blob in BLOBS:
        restored = restore(blob)
        again = restore(fuzz.closed(fuzz.opened(blob)))
        assert [x.positions.tolist() for x in again] == [x.positions.tolist() for x in restored]


def test_one_recipe_leaves_ragged_heads() -> None:
    assert any(layer.counts for layer in restore(BLOBS[3]))


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
