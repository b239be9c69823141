"""``python -m tests.bitstream.peak RECIPE [TOKENS]``: what memory ``compress`` and ``decompress`` take at their peak.

A process of its own, for the system's high-water mark counts everything, PyTorch's and numpy's memory alike. Prints one
JSON object: bytes of the cache and of the stream, and what each way took beyond what was there before (Linux only).
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs.tree import CLASSES, Tree, TreeProfile
from kvferry.fit.tree import JOINT
from kvferry.recipe import compress, decompress

LAYERS, HEADS, DIM, TOKENS = 28, 4, 128, 4000
"""The shape of Qwen2-VL-7B's cache; 4,000 tokens are 229 MB."""
PRINT = "7b" * 16
T = TypeVar("T")


def drawn(tokens: int) -> KVCache:
    """BF16 numbers from a normal distribution; ``tokens`` of text."""
    nothing = np.zeros(tokens, np.uint8)
    layout = PromptLayout(nothing.astype(np.int32), nothing, nothing, np.arange(tokens, dtype=np.int32)[None])
    generator = torch.Generator().manual_seed(0)
    every = torch.empty(LAYERS, 2, HEADS, tokens, DIM, dtype=torch.bfloat16)
    for layer in every.view(-1, tokens, DIM):
        layer[:] = torch.randn(tokens, DIM, generator=generator).bfloat16()
    index = torch.arange(tokens).expand(HEADS, -1).contiguous()
    return KVCache(tuple(LayerCache(k, v, index) for k, v in every), layout, tokens, PRINT)


def _read(name: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak(action: Callable[[], T]) -> tuple[T, int]:
    """What ``action`` returns, and by how much memory grew at most while it ran."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _read("VmRSS")
    result = action()
    return result, _read("VmHWM") - before


def _written(recipe: str, tokens: int) -> tuple[int, bytes, int]:
    """Bytes of a cache, its stream, and what writing it took; the cache is gone afterwards."""
    cache = drawn(tokens)
    blob, written = peak(lambda: compress(cache, recipe))
    return sum(x.keys.nbytes + x.values.nbytes for x in cache), blob, written


def profile() -> TreeProfile:
    """Bases of a 7B shape that turn nothing, for numbers that are all alike."""
    taken, lead, p = 64, JOINT // LAYERS, 2 * LAYERS * HEADS * DIM
    leaves, layers = (torch.eye(n).expand(b, n, n).clone() for b, n in ((p // DIM, DIM), (LAYERS, 2 * HEADS * taken)))
    octaves = torch.zeros(p, dtype=torch.int16)
    text = Tree(torch.zeros(p), leaves, layers, torch.eye(LAYERS * lead), octaves)
    none, steps = torch.zeros(0, dtype=torch.int64), torch.zeros(len(CLASSES), dtype=torch.int16)
    turning = (None,) * LAYERS
    return TreeProfile(
        PRINT, None, text, none, torch.zeros(0, 1), none, torch.zeros(0, p), steps, turning, (LAYERS, HEADS, DIM), {}
    )


def main(recipe: str, tokens: int) -> None:
    """A first round loads code; the second, on other numbers, is measured. ``transform:R`` gets a profile."""
    with tempfile.TemporaryDirectory() as folder:
        if "transform" in recipe:
            (Path(folder) / "p.profile").write_bytes(profile().to_bytes())
            recipe += f"@{folder}/p.profile"
        _measure(recipe, tokens)


def _measure(recipe: str, tokens: int) -> None:
    decompress(compress(drawn(256), recipe))
    size, blob, written = _written(recipe, tokens)
    _, read = peak(lambda: decompress(blob))
    print(json.dumps({"cache": size, "stream": len(blob), "compress": written, "decompress": read}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else TOKENS)
