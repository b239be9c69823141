"""What a smaller cache is worth while decoding: seconds per token and bytes held, as ratios in one run.

A random Qwen2-VL with the width of the 2B model, few layers and a small vocabulary decodes on top of random caches of
which all tokens, 40 % or 10 % are kept. The kinds take turns, so that a slow spell of the machine meets all of them.
On a CPU the clock is processor time on one thread, so that other jobs on the machine do not count. End to end is
prefill with the scores of ``vlcache@0.1,budget=sparsity``, selection, and 100 tokens, against a prefill without
scores and 100 tokens on the whole cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from evidence import build, build_inputs
from transformers import logging

from kvferry.cache import KVCache, LayerCache
from kvferry.evaluate.sweep import provenance
from kvferry.evidence import EvidenceRequest
from kvferry.models.attention import attached
from kvferry.models.layout import layout_of
from kvferry.models.prefill import read_prompt
from kvferry.models.resume import Decoder
from kvferry.recipe import Recipe
from kvferry.selection import evict, kept_count

KEPT = (1.0, 0.4, 0.1)
SHAPES = ((1024, 1), (4096, 1), (16384, 1), (4096, 8), (16384, 8))
"""Tokens of a prompt and how many prompts are decoded at once."""
WHOLE = (1024, 4096)
"""Tokens of the prompts that are read and answered from end to end."""
ANSWER = 100
RECIPE = Recipe.parse("vlcache@0.1,budget=sparsity|bf16")


class Bench:
    """One model, and caches of random numbers in its shape."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.cpu, self.steps = given.device == "cpu", given.steps
        self.model = build(given.layers, getattr(torch, given.dtype)).to(given.device)
        self.clock: Callable[[], float] = time.process_time if self.cpu else time.perf_counter

    def inputs(self, tokens: int) -> dict[str, torch.Tensor]:
        """A prompt with one picture."""
        found = {name: x.to(self.model.device) for name, x in build_inputs(tokens).items()}
        return {**found, "pixel_values": found["pixel_values"].to(self.model.dtype)}

    def cache(self, tokens: int, share: float) -> KVCache:
        """The first ``share`` of the positions of a random cache; which they are makes no difference to speed."""
        layout = layout_of(self.model, self.inputs(tokens))
        config = self.model.config.text_config
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        kept = kept_count(share, tokens)
        generator = torch.Generator().manual_seed(0)
        layers = []
        for _ in range(config.num_hidden_layers):
            keys, values = torch.randn(2, heads, kept, width, generator=generator).to(self.model.dtype)
            layers.append(LayerCache(keys, values, torch.arange(kept).repeat(heads, 1)))
        return KVCache(tuple(layers), layout, tokens, "")

    def decode(self, cache: KVCache, batch: int) -> float:
        """Seconds per token of each of ``batch`` sequences, the first token left out."""
        with attached(self.model):
            decoder = Decoder(self.model, *[cache] * batch)
            decoder.feed([7])
            began = self.clock()
            for _ in range(self.steps):
                decoder.feed([7])
            self._wait()
        return (self.clock() - began) / self.steps

    def answer(self, inputs: dict[str, torch.Tensor], recipe: Recipe | None) -> float:
        """Seconds from the prompt to the last of :data:`ANSWER` tokens."""
        requests: tuple[EvidenceRequest, ...] = () if recipe is None else recipe.requests
        began = self.clock()
        with attached(self.model):
            layout = layout_of(self.model, inputs)
            read = read_prompt(self.model, inputs, layout, requests, length=len(layout) - 1, fingerprint="")
            cache = read.cache if recipe is None else evict(read.cache, recipe.select(read))
            decoder = Decoder(self.model, cache)
            for _ in range(ANSWER):
                decoder.feed([7])
        self._wait()
        return self.clock() - began

    def _wait(self) -> None:
        if not self.cpu:
            torch.cuda.synchronize()


def decoding(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """For every shape and kept share, seconds per token of every round, and what a cache takes."""
    rows = []
    for tokens, batch in SHAPES:
        caches = {share: bench.cache(tokens, share) for share in KEPT}
        seconds: dict[float, list[float]] = {share: [] for share in KEPT}
        for turn in range(rounds + 1):
            for share in KEPT if turn % 2 else KEPT[::-1]:
                took = bench.decode(caches[share], batch)
                if turn:
                    seconds[share].append(took)
        rows += [
            {
                "tokens": tokens, "batch": batch, "kept": share, "seconds": seconds[share],
                "cache_bytes": cache.nbytes,
                "bytes_after": cache.nbytes + ANSWER * cache.nbytes // cache.layers[0].kept,
            }
            for share, cache in caches.items()
        ]  # fmt: skip
    return rows


def whole(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """From prompt to last token, on the whole cache and on a tenth of it."""
    rows = []
    for tokens in WHOLE:
        inputs = bench.inputs(tokens)
        full: list[float] = []
        kept: list[float] = []
        for turn in range(rounds):
            ways = ((full, None), (kept, RECIPE))
            for seconds, recipe in ways if turn % 2 else ways[::-1]:
                seconds.append(bench.answer(inputs, recipe))
        rows.append({"tokens": tokens, "recipe": str(RECIPE), "answer": ANSWER, "full": full, "kept": kept})
    return rows


def main() -> None:
    """Print tables, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--whole-rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    bench = Bench(given)
    with torch.inference_mode():
        found = {"decode": decoding(bench, given.rounds), "whole": whole(bench, given.whole_rounds)}
    device = platform.processor() or platform.machine() if given.device == "cpu" else torch.cuda.get_device_name()
    facts = {
        "command": shlex.join(["python", "benchmarks/decode.py", *sys.argv[1:]]), **provenance(),
        "device": device, "threads": given.threads, "layers": given.layers, "dtype": given.dtype, "steps": given.steps,
    }  # fmt: skip
    if given.json:
        print(json.dumps({**facts, **found}))
        return
    print(f"{facts}\n\n| tokens | batch | kept | ms a token | times faster | cache MiB | share |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for row in found["decode"]:
        full = next(x for x in found["decode"] if (x["tokens"], x["batch"]) == (row["tokens"], row["batch"]))
        took, faster = median(row["seconds"]), median(full["seconds"]) / median(row["seconds"])
        size, share = row["cache_bytes"] / 2**20, row["cache_bytes"] / full["cache_bytes"]
        print(
            f"| {row['tokens']} | {row['batch']} | {row['kept']:.0%} | {1e3 * took:.1f} | {faster:.2f} | {size:.1f} "
            f"| {share:.3f} |"
        )
    print(f"\nPrompt to {ANSWER} tokens, {RECIPE}\n\n| tokens | full s | kept s | times faster |")
    print("|---:|---:|---:|---:|")
    for row in found["whole"]:
        full, kept = median(row["full"]), median(row["kept"])
        print(f"| {row['tokens']} | {full:.2f} | {kept:.2f} | {full / kept:.2f} |")


if __name__ == "__main__":
    main()
