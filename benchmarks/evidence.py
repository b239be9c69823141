"""What observing attention costs: prefill with evidence against plain SDPA prefill, as ratios in one run.

A random Qwen2-VL with the shapes of the 2B model and few layers reads one picture and a question. The kinds take
turns, so that a slow spell of the machine meets all of them; the median of each is compared. On a CPU the clock is
processor time on one thread by default, so that other jobs on the machine do not count. Peak memory is that of a fresh
process per kind, weights included (on a GPU: of what torch allocated). ``eager`` is what prefill costs where evidence
is read off attention matrices that Transformers hands out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration, logging

from kvferry.evaluate.sweep import provenance
from kvferry.evidence import EvidenceRequest
from kvferry.models.attention import attached
from kvferry.models.layout import layout_of
from kvferry.models.prefill import read_prompt

FEW, MANY, MEMORY = 1.10, 1.50, 1.05
"""Bounds on the ratios: scorers that watch few rows, those that watch all, and peak memory."""
KINDS: dict[str, tuple[tuple[EvidenceRequest, ...], float]] = {
    "no evidence": ((), FEW),
    "window of 32": ((EvidenceRequest("window", 32),), FEW),
    "question": ((EvidenceRequest("question"),), FEW),
    "question, last layer": ((EvidenceRequest("question", layers="last"),), FEW),
    "after the picture": ((EvidenceRequest("post_vision"),), FEW),
    "after the picture, and densities": (
        (EvidenceRequest("post_vision"), EvidenceRequest("post_vision", statistic="density")), MANY,
    ),
    "all rows": ((EvidenceRequest("all"),), MANY),
    "densities of all rows": ((EvidenceRequest("all", statistic="density"),), MANY),
    "coming queries": ((EvidenceRequest("all", statistic="queries"),), MANY),
}  # fmt: skip
PLAIN, EAGER = "plain", "eager"


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


class Bench:
    """One model and one prompt, read in every way there is."""

    def __init__(self, given: argparse.Namespace) -> None:
        dtype = getattr(torch, given.dtype)
        self.cpu = given.device == "cpu"
        self.model = build(given.layers, dtype).to(given.device)
        self.inputs = {k: v.to(given.device) for k, v in build_inputs(given.tokens).items()}
        self.inputs["pixel_values"] = self.inputs["pixel_values"].to(dtype)
        self.layout = layout_of(self.model, self.inputs)

    def read(self, kind: str) -> None:
        """One prefill."""
        if kind in KINDS:
            with attached(self.model):
                length = len(self.layout) - 1
                read_prompt(self.model, self.inputs, self.layout, KINDS[kind][0], length=length, fingerprint="")
        else:
            self.model.set_attn_implementation({"text_config": "eager" if kind == EAGER else "sdpa"})
            with torch.inference_mode():
                self.model(
                    **self.inputs, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1,
                    output_attentions=kind == EAGER,
                )  # fmt: skip
            self.model.set_attn_implementation({"text_config": "sdpa"})
        if not self.cpu:
            torch.cuda.synchronize()

    def seconds(self, kinds: list[str], rounds: int) -> dict[str, list[float]]:
        """Of every round, per kind."""
        clock = time.process_time if self.cpu else time.perf_counter
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(rounds + 1):
            for kind in kinds if turn % 2 else kinds[::-1]:
                began = clock()
                self.read(kind)
                if turn:
                    seconds[kind].append(clock() - began)
        return seconds

    def peak(self, kind: str) -> float:
        """Peak memory of this process after one prefill, MiB."""
        self.read(kind)
        if self.cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return torch.cuda.max_memory_allocated() / 2**20


def peaks(kinds: list[str]) -> dict[str, float]:
    """MiB per kind, each in a process of its own with this one's arguments.

    Tensors of 1 MiB and more are returned to the system when freed: glibc's moving threshold blurs the peak by 5 %.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    found = {}
    for kind in kinds:
        command = [sys.executable, *sys.argv, "--peak", kind]
        found[kind] = float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    return found


def main() -> None:
    """Print a table, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, EAGER], default=[*KINDS, EAGER], metavar="KIND")
    parser.add_argument("--peak", help="print the peak memory of one kind in MiB, and nothing else")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    if given.peak:
        print(Bench(given).peak(given.peak))
        return
    kinds = [PLAIN, *given.kinds]
    memory = peaks(kinds)
    rounds = Bench(given).seconds(kinds, given.rounds)
    seconds = {kind: statistics.median(times) for kind, times in rounds.items()}
    rows = {
        kind: {
            "seconds": seconds[kind],
            "rounds": rounds[kind],
            "ratio": seconds[kind] / seconds[PLAIN],
            "bound": KINDS[kind][1] if kind in KINDS else None,
            "peak_mib": memory[kind],
            "peak_ratio": memory[kind] / memory[PLAIN],
            "peak_bound": MEMORY if kind in KINDS else None,
        }
        for kind in kinds
    }
    device = platform.processor() or platform.machine()
    facts = {
        "device": device if given.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(), "layers": given.layers, "tokens": given.tokens, "rounds": given.rounds,
        "dtype": given.dtype, "torch": torch.__version__,
    }  # fmt: skip
    if given.json:
        command = shlex.join(["python", "benchmarks/evidence.py", *sys.argv[1:]])
        print(json.dumps({"command": command, **provenance(), **facts, "kinds": rows}, indent=2))
        return
    print(f"Prefill of {given.tokens} tokens, {facts}\n")
    print("| prefill | median s | ratio to plain SDPA | bound | peak MiB | ratio | bound |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for kind, row in rows.items():
        print(
            f"| {kind} | {row['seconds']:.3f} | {row['ratio']:.3f} | {_bound(row['ratio'], row['bound'])} "
            f"| {row['peak_mib']:.0f} | {row['peak_ratio']:.3f} | {_bound(row['peak_ratio'], row['peak_bound'])} |"
        )


def _bound(ratio: Any, bound: Any) -> str:
    if bound is None:
        return ""
    return f"{bound:.2f}" if ratio <= bound else f"{bound:.2f} missed"


if __name__ == "__main__":
    main()
