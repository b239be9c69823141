"""Test vectors: ``python -m tests.bitstream.golden`` writes them. They change only with the format's version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvferry.bitstream.contexts import Contexts
from kvferry.bitstream.positions import write_sparse
from kvferry.bitstream.varints import write_varints
from kvferry.cache import KVCache, LayerCache
from kvferry.recipe import compress
from tests.helpers import layout

DATA = Path(__file__).parent / "data"
STREAMS: dict[str, tuple[str, int]] = {
    "full-bf16": ("full|bf16", 1),
    "full-int8": ("full|int8", 1),
    "none-int4": ("none|int4", 1),
    "knorm-int3-zstd": ("knorm@0.25|int3|zstd", 1),
    "full-int2-range": ("full|int2,coder=range", 1),
    "random-int1": ("random@0.1|int1", 1),
    "knorm-head-int4": ("knorm@0.25,budget=head|int4", 1),
    "knorm-int2-tiers": ("knorm@0.5|int2", 3),
    "full-bf16-zstd-tiers": ("full|bf16|zstd", 2),
    "full-kivi2": ("full|kivi:2,residual=8", 1),
    "knorm-head-kivi3": ("knorm@0.5,budget=head|kivi:3,group=4,residual=2", 1),
    "full-turbo2.5": ("full|turbo:2.5", 1),
    "full-fp8": ("full|fp8", 1),
    "knorm-apart": ("knorm@0.5|apart,text=bf16,visual=int2/int4", 1),
}
"""Name -> recipe and tiers."""


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


def describe(restored: KVCache) -> dict[str, Any]:
    """What a reader must get: the prompt, the positions, the first and last vectors, and a digest of everything."""
    prompt = restored.layout
    return {
        "fingerprint": restored.fingerprint,
        "recipe": restored.recipe,
        "length": restored.length,
        "token_ids": prompt.token_ids.tolist(),
        "modality": prompt.modality.tolist(),
        "role": prompt.role.tolist(),
        "rotary_positions": prompt.positions.tolist(),
        "rope_delta": prompt.rope_delta,
        "layers": [
            {
                "counts": list(layer.per_head),
                "positions": [head.positions[0].tolist() for head in layer.split()],
                "first_key": layer.keys[0, 0].tolist(),
                "last_value": layer.values[-1, -1].tolist(),
            }
            for layer in restored
        ],
        "sha256": digest(restored),
    }


def forms() -> list[dict[str, Any]]:
    """Each form of positions on its own: bytes and the numbers they stand for."""
    vectors = []
    for rows, length, numbers in (
        (1, 9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 40, []),
        (2, 20, [0, 1, 2, 3, 17, 20, 21, 22, 23, 30]),
        (3, 700, [0, 5, 699, 700, 701, 1400, 2099]),
    ):
        flat = np.array(numbers, np.int64)
        mask = np.zeros(rows * length, bool)
        mask[flat] = True
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        grid = mask.reshape(rows, length)
        for form, data in {
            "bitmap": np.packbits(mask, bitorder="little").tobytes(),
            "sparse": write_sparse(flat, rows * length),
            "runs": write_varints(np.diff(edges, prepend=0)),
            "coded": Contexts(np.zeros(length, bool)).encode(grid, np.zeros_like(grid), None),
        }.items():
            vectors.append({"form": form, "rows": rows, "length": length, "hex": data.hex(), "numbers": numbers})
    return vectors


def main() -> None:
    """Write one stream per recipe and what each decodes to."""
    from kvferry.recipe import decompress

    DATA.mkdir(exist_ok=True)
    expected = {}
    for name, (recipe, tiers) in STREAMS.items():
        blob = compress(cache(), recipe, tiers)
        (DATA / f"{name}.kvf").write_bytes(blob)
        expected[name] = describe(decompress(blob))
    (DATA / "expected.json").write_text(json.dumps(expected) + "\n")
    (DATA / "positions.json").write_text("[\n" + ",\n".join(map(json.dumps, forms())) + "\n]\n")


if __name__ == "__main__":
    main()
