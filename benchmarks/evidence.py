"""What observing attention costs: prefill with evidence against plain SDPA prefill, as a ratio in one run.

A random Qwen2-VL with the shapes of the 2B model and few layers reads one picture and a question. The kinds take
turns, so that a slow spell of the machine meets all of them; the median of each is compared. On a CPU the clock is
processor time on one thread by default, so that other jobs on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from kvferry.evidence import EvidenceRequest
from kvferry.models.attention import attached
from kvferry.models.layout import layout_of
from kvferry.models.prefill import read_prompt

BOUND = 1.15
KINDS: dict[str, tuple[EvidenceRequest, ...]] = {
    "no evidence": (),
    "window of 32": (EvidenceRequest("window", 32),),
    "question": (EvidenceRequest("question"),),
    "question, last layer": (EvidenceRequest("question", layers="last"),),
    "after the picture": (EvidenceRequest("post_vision"),),
    "all rows": (EvidenceRequest("all"),),
}
BOUNDED = ("window of 32", "question", "question, last layer", "after the picture")


def build(layers: int, dtype: torch.dtype) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL-2B's language model with fewer layers and a small vocabulary, random weights."""
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": layers, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 2048, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 1536, "mlp_ratio": 2},
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config).to(dtype).eval()


def build_inputs(tokens: int, question: int = 24) -> dict[str, torch.Tensor]:
    """A prompt of ``tokens``: words, one picture, a question of ``question`` tokens."""
    side = int((tokens - question - 8) ** 0.5)
    visual = torch.full((side * side,), 3)
    words = torch.randint(10, 2000, (tokens - len(visual),))
    ids = torch.cat([words[:-question], visual, words[-question:]])[None]
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 3).long(),
        "pixel_values": torch.randn(side * side * 4, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
    }


def measure(
    layers: int, tokens: int, rounds: int, dtype: torch.dtype, device: str, names: list[str]
) -> dict[str, list[float]]:
    """Seconds per kind and round; ``plain`` is Transformers alone with SDPA."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    model = build(layers, dtype).to(device)
    inputs = {k: v.to(device) for k, v in build_inputs(tokens).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    layout = layout_of(model, inputs)

    def plain() -> None:
        with torch.inference_mode():
            model(**inputs, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)

    def watched(requests: tuple[EvidenceRequest, ...]) -> None:
        with attached(model):
            read_prompt(model, inputs, layout, requests, length=tokens - 1, fingerprint="")

    kinds: dict[str, Any] = {"plain": plain, **{k: (lambda r=KINDS[k]: watched(r)) for k in names}}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        order = list(kinds) if turn % 2 else list(kinds)[::-1]
        for kind in order:
            began = clock()
            kinds[kind]()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                seconds[kind].append(clock() - began)
    return seconds


def main() -> None:
    """Print a table, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    seconds = measure(given.layers, given.tokens, given.rounds, dtype, given.device, given.kinds)
    middle = {kind: statistics.median(times) for kind, times in seconds.items()}
    ratios = {kind: value / middle["plain"] for kind, value in middle.items()}
    device = platform.processor() or platform.machine()
    facts = {
        "device": device if given.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(), "layers": given.layers, "tokens": given.tokens, "rounds": given.rounds,
        "dtype": given.dtype, "torch": torch.__version__,
    }  # fmt: skip
    if given.json:
        print(json.dumps({**facts, "median_seconds": middle, "ratio": ratios, "bound": BOUND}, indent=2))
        return
    print(f"Prefill of {given.tokens} tokens, {facts}\n")
    print("| prefill | median s | ratio to plain SDPA | within 1.15x |\n|---|---:|---:|---|")
    for kind, value in middle.items():
        verdict = ("yes" if ratios[kind] <= BOUND else "no") if kind in BOUNDED else ""
        print(f"| {kind} | {value:.3f} | {ratios[kind]:.3f} | {verdict} |")


if __name__ == "__main__":
    main()
