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
ROOM = 0.4
"""Of the cache: what a layer takes on its way, several times over, and what the allocator keeps."""


@pytest.mark.parametrize("recipe", ["full|bf16", "full|int8"])
def test_a_cache_is_streamed(recipe: str) -> None:
    found = subprocess.run([sys.executable, "-m", "tests.bitstream.peak", recipe], capture_output=True, check=True)
    seen = json.loads(found.stdout)
    assert seen["compress"] < seen["stream"] + ROOM * seen["cache"], seen
    assert seen["decompress"] < (1 + ROOM) * seen["cache"], seen
