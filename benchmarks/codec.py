"""What compressing costs, as ratios measured in one run: against memcpy, and against the testbed's prefill.

``python benchmarks/codec.py [--model testbed/cloud] [--rounds 15] [--json]``. One thread. Two caches: one of random
numbers in the shape of Qwen2-VL-7B (28 layers would only repeat the figures: 4 are taken), and a real one of the
model, whose prefill is timed in turn with compress and decompress, so that a busy machine slows both alike.

The first table times codecs alone, layer by layer, and lossless stages alone on their payloads; the second whole
bitstreams. Rows of other libraries appear where those are installed (``optimum-quanto``, ``hqq``, ``torchao``: use a
virtual environment of their own).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import numpy as np
import torch
from codec_joint import JOINT, joint_cache
from codec_peers import peers
from rich.console import Console
from rich.table import Table

from kvferry.bitstream import inspect, records
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import Codec, for_stage, packing, parse_codec
from kvferry.errors import KVFerryError
from kvferry.recipe import compress, decompress

CODECS = ("bf16", "int8", "int4", "int3", "int2", "fp8", "kivi:4", "kivi:2", "turbo:4", "turbo:2.5")
RECIPES = ("full|bf16", "full|bf16|zstd", "full|int8", "full|int8|zstd", "full|int4", "full|int4|zstd", "full|int3")
PREFILL_RECIPES = (
    *RECIPES, "q2c@0.25|int8", "q2c@0.25|int4", "q2c@0.25|int4|zstd", "snapkv@0.25|int4",
    "full|transform:24", "full|transform:64", "leaveout@0.1,budget=shared|transform:64",
)  # fmt: skip

SCENES = 6
"""Drawn scenes on which time is held against prefill."""


def random_cache(tokens: int = 1400, layers: int = 4, heads: int = 4, dim: int = 128) -> KVCache:
    """BF16 numbers from a normal distribution."""
    nothing = np.zeros(tokens, np.uint8)
    layout = PromptLayout(nothing.astype(np.int32), nothing, nothing, np.arange(tokens, dtype=np.int32)[None])
    generator = torch.Generator().manual_seed(0)
    make: Callable[[], torch.Tensor] = lambda: torch.randn(heads, tokens, dim, generator=generator).bfloat16()  # noqa: E731
    positions = torch.arange(tokens).expand(heads, -1).contiguous()
    return KVCache(tuple(LayerCache(make(), make(), positions) for _ in range(layers)), layout, tokens, "")


def keep_memory() -> None:
    """Let glibc keep what is freed: else every round measures the system's page faults, of memcpy most of all."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, (1 << 31) - 1)


def in_turn(actions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Least processor seconds of each action; they take turns. On a busy machine, a clock on the wall would count what
    others do; the least is what they disturb least."""
    seconds: list[list[float]] = [[] for _ in actions]
    for turn in range(rounds + 1):
        for action, record in zip(actions, seconds, strict=True):
            began = time.process_time()
            action()
            if turn:
                record.append(time.process_time() - began)
    return [min(record) for record in seconds]


def integers_against_memcpy(layers: int, rounds: int) -> list[dict[str, object]]:
    """Integer codecs with numba's kernels and without, over copying the same BF16 tensors into memory that is there."""
    cache = random_cache(layers=layers)
    tensors = [tensor for layer in cache for tensor in (layer.keys, layer.values)]
    held = [torch.empty_like(tensor) for tensor in tensors]
    rows: list[dict[str, object]] = []
    for name in ("int8", "int4"):
        codec = for_stage(parse_codec(name), False)
        encode = lambda codec=codec: [  # noqa: E731
            codec.encode(i, x.keys, x.values, x.positions, cache.layout) for i, x in enumerate(cache)
        ]
        payloads = encode()
        for path in ("numba", "torch"):
            with patch.object(packing, "_kernels", packing._kernels if path == "numba" else lambda: None):
                copy, write, read = in_turn(
                    [
                        lambda: [a.copy_(b) for a, b in zip(held, tensors, strict=True)],
                        encode,
                        lambda codec=codec, p=payloads: decode(codec, p, cache),
                    ],
                    rounds,
                )
            speed = sum(tensor.nbytes for tensor in tensors) / copy / 1e9
            row = {"what": f"{name}, {path}", "memcpy GB/s": speed}
            rows.append(row | {"pack/memcpy": copy / write, "unpack/memcpy": copy / read})
    return rows


def codecs_against_memcpy(rounds: int) -> list[dict[str, object]]:
    """Throughput of codecs, lossless stages and peers in BF16 bytes over that of copying the same tensors."""
    cache = random_cache()
    tensors = [tensor for layer in cache for tensor in (layer.keys, layer.values)]
    held = [torch.empty_like(tensor) for tensor in tensors]
    clone = lambda: [a.copy_(b) for a, b in zip(held, tensors, strict=True)]  # noqa: E731
    rows: list[dict[str, object]] = []

    def row(name: str, size: int, pack: Callable[[], object], unpack: Callable[[], object]) -> None:
        copy, write, read = in_turn([clone, pack, unpack], rounds)
        smaller = sum(tensor.nbytes for tensor in tensors) / size if size else None
        rows.append({"what": name, "smaller": smaller, "pack/memcpy": copy / write, "unpack/memcpy": copy / read})

    for name in CODECS:
        codec = for_stage(parse_codec(name), False)
        encode = lambda codec=codec: [  # noqa: E731
            codec.encode(i, x.keys, x.values, x.positions, cache.layout) for i, x in enumerate(cache)
        ]
        payloads = encode()
        row(name, sum(map(len, payloads)), encode, lambda codec=codec, p=payloads: decode(codec, p, cache))
        if name in ("bf16", "int8", "int4"):
            payloads = encode(for_stage(parse_codec(name), True))
            packed = [records.compress(payload) for payload in payloads]
            row(
                f"zstd alone, on {name}",
                sum(map(len, packed)),
                lambda p=payloads: [records.compress(x) for x in p],
                lambda p=packed, q=payloads: [records.decompress(x, len(y)) for x, y in zip(p, q, strict=True)],
            )
    for name, pack, unpack in peers():
        held = [pack(tensor[None]) for tensor in tensors]
        row(name, 0, lambda f=pack: [f(x[None]) for x in tensors], lambda f=unpack, h=held: [f(x) for x in h])
    return rows


def decode(codec: Codec, payloads: Sequence[bytes], cache: KVCache) -> list[object]:
    """Every layer of ``cache`` from its payload."""
    return [
        codec.decode(i, payload, tuple(x.keys.shape), tuple(x.values.shape), x.positions, cache.layout)
        for i, (payload, x) in enumerate(zip(payloads, cache, strict=True))
    ]


def against_memcpy(cache: KVCache, recipes: Sequence[str], rounds: int) -> list[dict[str, object]]:
    """Throughput in BF16 bytes over that of copying the same bytes."""
    rows: list[dict[str, object]] = []
    for recipe in recipes:
        blob = compress(cache, recipe)
        copy, write, read = in_turn(
            [
                lambda: [(x.keys.clone(), x.values.clone()) for x in cache],
                lambda recipe=recipe: compress(cache, recipe),
                lambda blob=blob: decompress(blob),
            ],
            rounds,
        )
        rows.append(
            {
                "recipe": recipe,
                "smaller": cache.full_bf16_bytes / len(blob),
                "compress/memcpy": copy / write,
                "decompress/memcpy": copy / read,
            }
        )
    return rows


def against_prefill(model: str, rounds: int) -> list[dict[str, object]]:
    """Compress plus decompress as a share of the prefill that made the cache, over some drawn scenes."""
    from kvferry.models import load
    from kvferry.testbed import samples

    vlm, scenes = load(model), list(samples("validation", SCENES))
    rows: list[dict[str, object]] = []
    for recipe in PREFILL_RECIPES:
        seconds, sizes, overhead, whole = np.zeros(3), 0, 0, 0
        for scene in scenes:
            prefilled = vlm.prefill(scene.images, scene.question, recipe=recipe)
            blob = compress(prefilled, recipe)
            report = inspect(blob)
            sizes, overhead = sizes + report.total_bytes, overhead + report.overhead_bytes
            whole += report.total_bytes * report.ratio
            seconds += in_turn(
                [
                    lambda scene=scene, recipe=recipe: vlm.prefill(scene.images, scene.question, recipe=recipe),
                    lambda prefilled=prefilled, recipe=recipe: compress(prefilled, recipe),
                    lambda blob=blob: decompress(blob),
                ],
                rounds,
            )
        prefill, write, read = seconds.tolist()
        rows.append(
            {
                "recipe": recipe,
                "bytes": round(sizes / len(scenes)),
                "overhead bytes": round(overhead / len(scenes)),
                "smaller": whole / sizes,
                "compress %": 100 * write / prefill,
                "decompress %": 100 * read / prefill,
                "both %": 100 * (write + read) / prefill,
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What compressing costs, as ratios in one run.")
    parser.add_argument("--model", default="testbed/cloud")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = "4 x [2, 4, 1400, 128] BF16"
    keep_memory()
    rounds = arguments.rounds
    tables = {
        **{
            f"integers: ratio to memcpy, {where} ({layers} x [2, 4, 1400, 128] BF16, {where})": integers_against_memcpy(
                layers, n
            )
            for layers, where, n in ((4, "small", rounds), (28, "large", min(rounds, 5)))
        },
        f"codecs: throughput as a ratio to memcpy ({shape})": codecs_against_memcpy(arguments.rounds),
        f"whole bitstreams: throughput as a ratio to memcpy ({shape})": against_memcpy(
            random_cache(), RECIPES, arguments.rounds
        ),
        "all layers together: throughput as a ratio to memcpy (28 x [2, 4, 512, 128] BF16, synthetic profile)": (
            against_memcpy(joint_cache(), JOINT, min(arguments.rounds, 5))
        ),
    }
    try:
        tables[f"share of prefill on {arguments.model}"] = against_prefill(arguments.model, arguments.rounds)
    except KVFerryError as error:
        Console(stderr=True).print(f"no comparison with prefill: {error}")
    if arguments.json:
        print(json.dumps(tables))
        return
    for title, rows in tables.items():
        table = Table(*rows[0], title=title, title_justify="left")
        for row in rows:
            table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
