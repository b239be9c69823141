"""What compressing costs, as ratios measured in one run: against memcpy, and against the testbed's prefill.

``python benchmarks/codec.py [--model testbed/cloud] [--rounds 15] [--json]``. One thread. Two caches: one of random
numbers in the shape of Qwen2-VL-7B (28 layers would only repeat the figures: 4 are taken), and a real one of the
model, whose prefill is timed in turn with compress and decompress, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kvferry.bitstream import inspect
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import KVFerryError
from kvferry.recipe import compress, decompress

RECIPES = ("full|bf16", "full|bf16|zstd", "full|int8", "full|int8|zstd", "full|int4", "full|int4|zstd", "full|int3")
PREFILL_RECIPES = (*RECIPES, "q2c@0.25|int8", "q2c@0.25|int4", "q2c@0.25|int4|zstd", "snapkv@0.25|int4")


def random_cache(tokens: int = 1400, layers: int = 4, heads: int = 4, dim: int = 128) -> KVCache:
    """BF16 numbers from a normal distribution."""
    nothing = np.zeros(tokens, np.uint8)
    layout = PromptLayout(nothing.astype(np.int32), nothing, nothing, np.arange(tokens, dtype=np.int32)[None])
    generator = torch.Generator().manual_seed(0)
    make: Callable[[], torch.Tensor] = lambda: torch.randn(heads, tokens, dim, generator=generator).bfloat16()  # noqa: E731
    positions = torch.arange(tokens).expand(heads, -1).contiguous()
    return KVCache(tuple(LayerCache(make(), make(), positions) for _ in range(layers)), layout, tokens, "")


def in_turn(actions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Least seconds of each action; they take turns. The least is what a busy machine disturbs least."""
    seconds: list[list[float]] = [[] for _ in actions]
    for turn in range(rounds + 1):
        for action, record in zip(actions, seconds, strict=True):
            began = time.perf_counter()
            action()
            if turn:
                record.append(time.perf_counter() - began)
    return [min(record) for record in seconds]


def against_memcpy(rounds: int) -> list[dict[str, object]]:
    """Throughput in BF16 bytes over that of copying the same bytes."""
    cache = random_cache()
    rows: list[dict[str, object]] = []
    for recipe in RECIPES:
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
    """Compress plus decompress as a share of the prefill that made the cache."""
    from kvferry.models import load

    vlm = load(model)
    picture = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    question = "what colour is the circle ?"
    rows: list[dict[str, object]] = []
    for recipe in PREFILL_RECIPES:
        prefilled = vlm.prefill([picture], question, recipe=recipe)
        blob = compress(prefilled, recipe)
        report = inspect(blob)
        prefill, write, read = in_turn(
            [
                lambda recipe=recipe: vlm.prefill([picture], question, recipe=recipe),
                lambda prefilled=prefilled, recipe=recipe: compress(prefilled, recipe),
                lambda blob=blob: decompress(blob),
            ],
            rounds,
        )
        rows.append(
            {
                "recipe": recipe,
                "bytes": report.total_bytes,
                "overhead bytes": report.overhead_bytes,
                "smaller": report.ratio,
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
    tables = {"throughput as a ratio to memcpy (4 x [2, 4, 1400, 128] BF16)": against_memcpy(arguments.rounds)}
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
