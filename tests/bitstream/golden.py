"""Test vectors: ``python -m tests.bitstream.golden`` writes them. They change only with the format's version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from kvferry.cache import KVCache, LayerCache
from kvferry.recipe import compress
from tests.helpers import layout

DATA = Path(__file__).parent / "data"
RECIPES = {
    "full-bf16": "full|bf16",
    "full-int8": "full|int8",
    "none-int4": "none|int4",
    "knorm-int3-zstd": "knorm@0.25|int3|zstd",
    "random-int1": "random@0.1|int1",
    "knorm-head-int4": "knorm@0.25,budget=head|int4",
    "full-kivi2": "full|kivi:2,residual=8",
    "knorm-head-kivi3": "knorm@0.5,budget=head|kivi:3,group=4,residual=2",
    "full-turbo2.5": "full|turbo:2.5",
    "full-fp8": "full|fp8",
    "knorm-apart": "knorm@0.5|apart,text=bf16,visual=int2/int4",
}


def cache() -> KVCache:
    """Numbers that any machine makes alike: quarters of small integers, exact in bfloat16."""
    prompt = layout()
    length = len(prompt) - 1
    layers = []
    for index in range(2):
        whole = np.arange(2 * 2 * length * 8, dtype=np.int64).reshape(2, 2, length, 8)
        keys, values = torch.from_numpy((whole * whole * (index + 3) % 61 - 30) / 4).to(torch.bfloat16)
        layers.append(LayerCache(keys, values, torch.arange(length).expand(2, -1).contiguous()))
    return KVCache(tuple(layers), prompt, length, fingerprint="0123456789abcdef", model_name="golden")


def digest(restored: KVCache) -> str:
    """SHA-256 over positions, keys and values, layer by layer."""
    sha = hashlib.sha256()
    for layer in restored:
        sha.update(layer.positions.numpy().astype("<i8").tobytes())
        for tensor in (layer.keys, layer.values):
            sha.update(tensor.contiguous().view(torch.int16).numpy().astype("<i2").tobytes())
    return sha.hexdigest()


def main() -> None:
    """Write one stream per recipe and what each decodes to."""
    from kvferry.recipe import decompress

    DATA.mkdir(exist_ok=True)
    digests = {}
    for name, recipe in RECIPES.items():
        blob = compress(cache(), recipe)
        (DATA / f"{name}.kvf").write_bytes(blob)
        digests[name] = digest(decompress(blob))
    (DATA / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main()
