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
PROFILED = {
    "full-transform8-tree": ("tree", "full|transform:8"),
    "full-transform8-basis": ("basis", "full|transform:8"),
    "full-kvtc4": ("kvtc", "full|kvtc:4"),
}
"""Name -> profile beside it and recipe, without the profile's name. Decoded by floating point: numbers are near, not
equal."""


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


def profiles() -> dict[str, Any]:
    """One of each kind and version, of tokens that are drawn."""
    from kvferry.codecs.profile import Axes, Basis, PlainProfile, Profile
    from kvferry.codecs.tree import TreeProfile, starts
    from kvferry.fit.axes import principal_axes
    from kvferry.fit.tree import make_tree
    from kvferry.rope import Rotary

    made = cache()
    layers, (heads, _, dim) = len(made.layers), made.layers[0].keys.shape
    width, random = 2 * layers * heads * dim, torch.Generator().manual_seed(17)
    rows = torch.randn(600, width, generator=random) @ torch.randn(width, width, generator=random) / 2
    rotary, shape = (Rotary(0.5 ** torch.arange(dim // 2).float()), None), (layers, heads, dim)
    known = torch.from_numpy(np.sort(starts(made.layout, 3)))
    eye = torch.eye(dim).expand(2 * layers * heads, dim, dim)
    trees = [make_tree(torch.full((width,), mean), rows.clone(), eye, layers) for mean in (0.5, -0.5)]
    steps = torch.tensor([0, 8, -4, 10, 24, 3], dtype=torch.int16)
    words = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    common: dict[str, Any] = {"fingerprint": made.fingerprint, "rotary": rotary, "shape": shape, "facts": {"n": 1}}
    sides = [Axes(x.mean(0), *principal_axes(x - x.mean(0), width // 2)) for x in rows.chunk(2, 1)]

    def basis(x: torch.Tensor) -> Basis:
        return Basis(x.mean(0), eye, *principal_axes(x - x.mean(0), width))

    return {
        "tree": TreeProfile(visual=trees[0], text=trees[1], words=words[0], word_means=words[1], starts=known,
                            start_means=rows[:3], steps=steps, **common),
        "basis": Profile(visual=basis(rows), text=basis(-rows), words=words[0], word_means=rows[:0], **common),
        "kvtc": PlainProfile(keys=sides[0], values=sides[1], **common),
    }  # fmt: skip


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


def decoded(blob: bytes) -> dict[str, Any]:
    """What a reader must get of a stream that takes a profile: the prompt and positions, and numbers near to these."""
    from kvferry.recipe import decompress

    restored = decompress(blob)
    numbers = torch.stack([torch.stack([x.keys, x.values]) for x in restored]).float()
    there = torch.stack([torch.stack([x.keys, x.values]) for x in cache()]).float()
    return {
        "recipe": restored.recipe,
        "positions": [x.positions[0].tolist() for x in restored],
        "first": numbers[0, 0, 0, 0].tolist(),
        "last": numbers[-1, -1, -1, -1].tolist(),
        "norm": float(numbers.norm()),
        "error": float((numbers - there).norm() / there.norm()),
    }


def main() -> None:
    """Write one stream per recipe and what each decodes to; profiles too, where there are none yet."""
    from kvferry.recipe import decompress

    DATA.mkdir(exist_ok=True)
    expected = {}
    for name, (recipe, tiers) in STREAMS.items():
        blob = compress(cache(), recipe, tiers)
        (DATA / f"{name}.kvf").write_bytes(blob)
        expected[name] = describe(decompress(blob))
    for name, profile in profiles().items():
        file = DATA / f"{name}.profile"
        if not file.exists():
            file.write_bytes(profile.to_bytes())
    for name, (profile, recipe) in PROFILED.items():
        blob = compress(cache(), f"{recipe}@{DATA / profile}.profile")
        (DATA / f"{name}.kvf").write_bytes(blob)
        expected[name] = decoded(blob)
    (DATA / "expected.json").write_text(json.dumps(expected) + "\n")
    (DATA / "positions.json").write_text("[\n" + ",\n".join(map(json.dumps, forms())) + "\n]\n")


if __name__ == "__main__":
    main()
