"""``python -m tests.bitstream.peak RECIPE``: how much memory ``compress`` and ``decompress`` take at their peak.

A process of its own, for the system's high-water mark counts everything, PyTorch's and numpy's memory alike. Prints one
JSON object: bytes of the cache and of the stream, and what each way took beyond what was there before (Linux only).
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.recipe import compress, decompress

LAYERS, HEADS, DIM, TOKENS = 28, 4, 128, 4000
"""The shape of Qwen2-VL-7B's cache; 4,000 tokens are 229 MB."""
T = TypeVar("T")


def drawn(tokens: int, layers: int = LAYERS, fingerprint: str = "") -> KVCache:
    """BF16 numbers from a normal distribution; ``tokens`` of text."""
    nothing = np.zeros(tokens, np.uint8)
    layout = PromptLayout(nothing.astype(np.int32), nothing, nothing, np.arange(tokens, dtype=np.int32)[None])
    generator = torch.Generator().manual_seed(0)
    every = torch.empty(layers, 2, HEADS, tokens, DIM, dtype=torch.bfloat16)
    for layer in every.view(-1, tokens, DIM):
        layer[:] = torch.randn(tokens, DIM, generator=generator).bfloat16()
    index = torch.arange(tokens).expand(HEADS, -1).contiguous()
    return KVCache(tuple(LayerCache(k, v, index) for k, v in every), layout, tokens, fingerprint)


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


def _written(recipe: str) -> tuple[int, bytes, int]:
    """Bytes of a cache, its stream, and what writing it took; the cache is gone afterwards."""
    cache = drawn(TOKENS)
    blob, written = peak(lambda: compress(cache, recipe))
    return sum(x.keys.nbytes + x.values.nbytes for x in cache), blob, written


def main(recipe: str) -> None:
    """A first round loads code; the second, on other numbers, is measured."""
    decompress(compress(drawn(256), recipe))
    size, blob, written = _written(recipe)
    _, read = peak(lambda: decompress(blob))
    print(json.dumps({"cache": size, "stream": len(blob), "compress": written, "decompress": read}))


if __name__ == "__main__":
    main(sys.argv[1])
