"""How often an answer changes by rounding alone: the same prompt and weights, read in one pass and otherwise.

Every way answers greedily, whatever ends the answer; the answers are compared token by token with stock Transformers,
which reads the prompt in one pass. ``last apart`` is stock Transformers too, with ``prefill_chunk_size``: the last
prompt token is read by a pass of its own, as kvferry does when a cache is resumed. ``padded`` is stock with 8 padding
tokens before the prompt. Below, what the last row of one matrix product and of attention has to do with it.

Texts are JSON lines with a ``context``, such as paragraphs of SQuAD; several make one prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import logging

import kvferry
from kvferry.models import VLM, compressing, prefill_inputs
from kvferry.models.resume import continue_from

WAYS = ("last apart", "padded", "compressing(), full cache", "prefill, then resume")


def prompts(vlm: VLM, texts: Path, count: int, tokens: int) -> list[torch.Tensor]:
    """Token ids of ``count`` prompts, about ``tokens`` each, in the chat template."""
    contexts = [json.loads(line)["context"] for line in texts.read_text().splitlines()]
    found = []
    for index in range(count):
        several = " ".join((contexts + contexts)[2 * index % len(contexts) :][:8])
        words = vlm.tokenizer.decode(vlm.tokenizer(several)["input_ids"][: tokens - 40], skip_special_tokens=True)
        messages = [{"role": "user", "content": f"{words}\nWhat is this text about?"}]
        ids = vlm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        found.append(torch.tensor([ids]))
    return found


def answers(model: Any, ids: torch.Tensor, new: int) -> dict[str, list[int]]:
    """What every way says to one prompt."""
    n = ids.shape[1]
    greedy = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1}

    def stock(ids: torch.Tensor, padding: int = 0, **more: Any) -> list[int]:
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        said: list[int] = model.generate(ids, attention_mask=mask, **greedy, **more)[0, ids.shape[1] :].tolist()
        return said

    found = {"stock": stock(ids), "last apart": stock(ids, prefill_chunk_size=n - 1)}
    found["padded"] = stock(torch.nn.functional.pad(ids, (8, 0)), padding=8)
    with compressing(model, "full"):
        found["compressing(), full cache"] = stock(ids)
    cache = prefill_inputs(model, {"input_ids": ids}).cache
    found["prefill, then resume"] = list(continue_from(model, cache, max_new_tokens=new, stop=()).token_ids)
    return found


def last_rows(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Shares of numbers in the last row that differ when that row is computed alone: a product, and attention."""
    layer = model.get_decoder().layers[0]
    with torch.inference_mode():
        states = layer.input_layernorm(model.get_input_embeddings()(ids.to(model.device)))
        whole, alone = layer.self_attn.q_proj(states)[:, -1], layer.self_attn.q_proj(states[:, -1:])[:, 0]
        heads = states.view(1, ids.shape[1], -1, layer.self_attn.head_dim).transpose(1, 2)
        attend = torch.nn.functional.scaled_dot_product_attention
        seen = attend(heads, heads, heads, is_causal=True)[..., -1:, :]
        one = attend(heads[..., -1:, :], heads, heads)
    return float((whole != alone).float().mean()), float((seen != one).float().mean())


def report(found: list[dict[str, list[int]]], rows: list[tuple[float, float]], dtype: str, tokens: float) -> None:
    """Print the tables."""
    print(f"{len(found)} prompts of {tokens:.0f} tokens, {len(found[0]['stock'])} new tokens each, {dtype}\n")
    print("| way | other answers | other first tokens |\n|---|---|---|")
    for way in WAYS:
        other = sum(x[way] != x["stock"] for x in found)
        first = sum(x[way][0] != x["stock"][0] for x in found)
        print(f"| {way} | {other} of {len(found)} | {first} |")
    same = sum(x["prefill, then resume"] == x["last apart"] for x in found)
    print(f"\nresume answers as stock does with the last token apart: {same} of {len(found)}")
    product, attention = (statistics.mean(x) for x in zip(*rows, strict=True))
    print(f"numbers of a last row that differ when computed alone: product {product:.1%}, attention {attention:.1%}")


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description="How often an answer changes by rounding alone.")
    parser.add_argument("--model", default="smollm2", help="a language model that kvferry.load knows")
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines with a context")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    vlm = kvferry.load(asked.model, device=asked.device, dtype=asked.dtype)
    ids = [x.to(vlm.model.device) for x in prompts(vlm, asked.texts, asked.prompts, asked.tokens)]
    found = []
    for index, one in enumerate(ids):
        found.append(answers(vlm.model, one, asked.new))
        print(f"\r{index + 1} of {len(ids)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    report(found, [last_rows(vlm.model, x) for x in ids], asked.dtype, statistics.mean(x.shape[1] for x in ids))


if __name__ == "__main__":
    main()
