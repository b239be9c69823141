"""How often an answer changes by rounding alone: the same prompt and weights, read in one pass and otherwise.

Every way answers greedily, whatever ends the answer; the answers are compared token by token with stock Transformers,
which reads the prompt in one pass.

* ``stock, last apart``: Transformers too, but the last prompt token has a pass of its own (``prefill_chunk_size``).
* ``compressing()``: every token kept, the first answer token from the pass that read the prompt.
* ``resume``: the cache of all prompt tokens but the last, cut from that pass, and the last one fed again.

Texts are JSON lines with a ``context``, such as paragraphs of SQuAD; several make one prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, logging

import kvferry
from kvferry.cache import KVCache
from kvferry.models import VLM, layout_of
from kvferry.models.attention import detach
from kvferry.models.prefill import layers_from
from kvferry.models.resume import continue_from

WAYS = ("stock, last apart", "compressing()", "resume")


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
    """What every way says to one prompt; all but one share the pass that reads it."""
    n, layout = ids.shape[1], layout_of(model, {"input_ids": ids})
    past, apart = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        logits = model(ids, past_key_values=past, logits_to_keep=1).logits
        first = int(logits[0, -1].argmax())
        full = KVCache(layers_from(deepcopy(past), n), layout, n, fingerprint="")
        cut = KVCache(layers_from(deepcopy(past), n - 1), layout, n - 1, fingerprint="")
        model(ids[:, :-1], past_key_values=apart, logits_to_keep=1)
        found = {
            "stock": [first, *stock(model, past, torch.tensor([[first]]), new - 1)],
            "stock, last apart": stock(model, apart, ids[:, -1:], new),
        }
    went_on = continue_from(model, full, [first], new - 1, stop=()).token_ids
    found["compressing()"] = [first, *went_on]
    found["resume"] = list(continue_from(model, cut, None, new, stop=()).token_ids)
    return found


def stock(model: Any, past: DynamicCache, feed: torch.Tensor, new: int) -> list[int]:
    """Transformers' greedy decoding on a cache."""
    said: list[int] = []
    for _ in range(new):
        feed = model(feed.to(model.device), past_key_values=past, logits_to_keep=1).logits[:, -1:].argmax(-1)
        said.append(int(feed))
    return said


def report(found: list[dict[str, list[int]]], dtype: str, tokens: float) -> None:
    """Print the table."""
    print(f"{len(found)} prompts of {tokens:.0f} tokens, {len(found[0]['stock'])} new tokens each, {dtype}\n")
    print("| way | other answers | other first tokens |\n|---|---|---|")
    for way in WAYS:
        other = sum(x[way] != x["stock"] for x in found)
        first = sum(x[way][0] != x["stock"][0] for x in found)
        print(f"| {way} | {other} of {len(found)} | {first} |")


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
    detach(vlm.model)  # Stock; what goes on from a cache attaches kvferry's attention by itself.
    ids = [x.to(vlm.model.device) for x in prompts(vlm, asked.texts, asked.prompts, asked.tokens)]
    found = []
    for index, one in enumerate(ids):
        found.append(answers(vlm.model, one, asked.new))
        print(f"\r{index + 1} of {len(ids)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    report(found, asked.dtype, statistics.mean(x.shape[1] for x in ids))


if __name__ == "__main__":
    main()
