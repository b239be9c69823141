"""Layers are encoded and decoded one after the other: no second copy of a stream or a cache is ever held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's high-water mark"
)
ROOM = 0.5
"""Of the cache: what a layer takes on its way, several times over, and what the allocator keeps."""
FIXED = 300 * 10**6


def measured(*arguments: str) -> dict[str, int]:
    """What :mod:`tests.bitstream.peak` prints."""
    found = subprocess.run([sys.executable, "-m", "tests.bitstream.peak", *arguments], capture_output=True, check=True)
    seen: dict[str, int] = json.loads(found.stdout)
    return seen


@pytest.mark.parametrize("recipe", ["full|bf16", "full|int8"])
def test_a_cache_is_streamed(recipe: str) -> None:
    seen = measured(recipe)
    assert seen["compress"] < seen["stream"] + ROOM * seen["cache"], seen
    assert seen["decompress"] < (1 + ROOM) * seen["cache"], seen


def test_transform_takes_a_copy_and_no_more_than_its_own_room() -> None:
    """Tokens are turned a few at a time. Besides a copy of the cache, or the decoded one, it takes what does not grow
    with it: 150 MB at this shape, most of it what the allocator keeps; 15 times the cache it was."""
    seen = measured("full|transform:16", "1000")
    assert max(seen["compress"], seen["decompress"]) < seen["cache"] + FIXED, seen
