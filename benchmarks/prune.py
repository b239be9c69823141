"""What pruning inside prefill saves: prefill time and operations against a plain prefill, as ratios in one run.

A random Qwen2-VL with the shapes of the 2B model and few layers reads one picture and a question; the picture's tower
is left out of both (its embeddings are made once). The kinds take turns, so that a slow spell of the machine meets all
of them; the median of each is compared. The clock is processor time on one thread. With few layers a prune after the
first leaves a larger share of whole layers than in 28: the operations, by formula, say what the same rule gives there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, logging

from kvferry.evaluate.sweep import provenance
from kvferry.models.attention import attached
from kvferry.models.layout import layout_of
from kvferry.models.prefill import read_prompt
from kvferry.models.pruning import Pruning, check_prunable, prefill_flops

DEPTH = 28
"""Layers of the 2B model."""


def model_of(layers: int) -> Any:
    """Qwen2-VL-2B's shapes, but for the number of layers, a small tower and a small vocabulary."""
    logging.set_verbosity_error()
    text = {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": layers, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {"embed_dim": 64, "hidden_size": 1536, "depth": 1, "num_heads": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=1000, video_token_id=1001, vision_start_token_id=1002,
        vision_end_token_id=1003,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config).eval()


def prompt(side: int) -> dict[str, torch.Tensor]:
    """A picture of ``side x side`` visual tokens between words, and a question of 32."""
    ids = torch.cat([torch.arange(16), torch.full((side * side,), 1000), torch.arange(32) + 100])[None]
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 1000).long(),
        "pixel_values": torch.randn(4 * side * side, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--side", type=int, default=24, help="visual tokens along a side of the picture")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, inputs = model_of(given.layers), prompt(given.side)
    layout = layout_of(model, inputs)
    kinds: dict[str, Pruning | None] = {"none": None}
    kinds |= {f"layer {k}, {f:.0%}": Pruning(k, f) for k in (1, 2, 3) for f in (0.5, 0.25, 0.1)}
    check_prunable(model, Pruning(1, 0.5))
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    whole = prefill_flops(model, len(layout))
    one = whole / given.layers
    rows: list[dict[str, Any]] = []
    with attached(model):
        for turn in range(given.repeats + 1):
            for name, prune in kinds.items():
                began = time.process_time()
                found = read_prompt(model, inputs, layout, (), length=len(layout) - 1, fingerprint="", prune=prune)
                if turn:
                    seconds[name].append(time.process_time() - began)
                elif prune is not None:
                    flops = prefill_flops(model, len(layout), found.cache)
                    few = (flops - prune.layer * one) / (given.layers - prune.layer)
                    deep = (prune.layer * one + (DEPTH - prune.layer) * few) / (DEPTH * one)
                    rows.append({"pruned": name, "operations": flops / whole, f"of {DEPTH} layers": deep})
    plain = statistics.median(seconds["none"])
    for row in rows:
        row["time"] = statistics.median(seconds[row["pruned"]]) / plain
    if given.json:
        facts = {key: value for key, value in provenance().items() if key in ("commit", "machine")}
        print(json.dumps({"tokens": len(layout), "layers": given.layers, "rows": rows} | facts))
        return
    print(f"{len(layout)} tokens, {given.side**2} of them visual; {given.layers} layers of Qwen2-VL-2B's shapes")
    print(f"\n| visual tokens | operations | time | operations in {DEPTH} layers |\n|---|---|---|---|")
    for row in rows:
        shown = " | ".join(f"{row[name]:.2f}" for name in ("operations", "time", f"of {DEPTH} layers"))
        print(f"| {row['pruned']} | {shown} |")


if __name__ == "__main__":
    main()
