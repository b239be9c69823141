"""What zstd makes of integers channel by channel and token by token, on real caches.

``python benchmarks/order.py [--model testbed/cloud] [--questions 24]``: bytes of all payloads, validation split.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

import kvferry
from kvferry.bitstream.records import compress
from kvferry.codecs import Integer, for_stage
from kvferry.recipe import Recipe
from kvferry.testbed import samples

SELECTIONS = ("full", "leaveout@0.05", "leaveout@0.1", "leaveout@0.25", "q2c@0.25")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Two orders of integers under zstd.")
    parser.add_argument("--model", default="testbed/cloud")
    parser.add_argument("--questions", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vlm = kvferry.load(arguments.model)
    asked = list(samples("validation", arguments.questions))
    table = Table("selection", "codec", "packed", "zstd, by channel", "zstd, by token", "by token, %")
    for selection in SELECTIONS:
        caches = []
        for sample in asked:
            prefilled = vlm.prefill(list(sample.images), sample.question, recipe=selection)
            caches.append(Recipe.parse(selection).keep(prefilled))
        for bits in range(1, 9):
            sizes = [0, 0, 0]
            for cache in caches:
                for index, layer in enumerate(cache):
                    for order, lossless in enumerate((True, False)):
                        codec = for_stage(Integer(bits), lossless)
                        where = layer.positions, cache.layout
                        payload = codec.encode(index, layer.keys, layer.values, *where)  # type: ignore[union-attr]
                        sizes[1 + order] += min(len(payload), len(compress(payload)))
                    sizes[0] += len(payload)
            table.add_row(
                selection, f"int{bits}", *(f"{x:,}" for x in sizes), f"{100 * sizes[2] / sizes[1] - 100:+.1f}"
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
