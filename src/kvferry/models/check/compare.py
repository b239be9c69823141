"""The comparisons that decide whether a family can be served, on a small model of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from kvferry.cache import KVCache, LayerCache
from kvferry.evidence import EvidenceRequest, Prefilled
from kvferry.models.attention import attached, rows_of
from kvferry.models.check.reference import reference
from kvferry.models.check.verdict import Difference
from kvferry.models.compressing import compressing
from kvferry.models.layout import layout_of
from kvferry.models.prefill import read_prompt
from kvferry.models.resume import Decoder
from kvferry.selection.base import Selection
from kvferry.selection.eviction import evict

Inputs = dict[str, torch.Tensor]
ALL, QUESTION = EvidenceRequest("all"), EvidenceRequest("question")
NEW = (7, 11, 13, 17, 19, 23)
STEPS = 6


def full_against_stock(model: PreTrainedModel, inputs: Inputs) -> Difference:
    """A prompt read and continued by kvferry, nothing dropped, against one plain forward pass."""
    with torch.no_grad():
        stock = model(**longer(inputs, NEW), use_cache=False).logits[0].float()
    n = inputs["input_ids"].shape[1]
    prefilled = read(model, inputs)
    ours = feed(model, prefilled.cache, [*prefilled.cache.pending.tolist(), *NEW])
    first = apart(prefilled.next_logits[None], stock[n - 1 : n], "the first answer token")
    return max(first, apart(ours, stock[n - 1 :], "answer token"), key=lambda x: x.size)


def read(model: PreTrainedModel, inputs: Inputs, requests: tuple[EvidenceRequest, ...] = ()) -> Prefilled:
    """:func:`kvferry.models.prefill.prefill_inputs` without a look at whether the family is supported."""
    layout = layout_of(model, inputs)
    with attached(model):
        return read_prompt(model, inputs, layout, requests, length=len(layout) - 1, fingerprint="")


def feed(model: PreTrainedModel, cache: KVCache, tokens: list[int], step: int = 2) -> torch.Tensor:
    """Logits after each of ``tokens``, a few at a time."""
    with attached(model):
        decoder = Decoder(model, cache)
        blocks = [tokens[i : i + step] for i in range(0, len(tokens), step)]
        return torch.cat([decoder.feed(x, logits=len(x))[0] for x in blocks])


def evicted_against_masked(model: PreTrainedModel, inputs: Inputs, *, per_head: bool) -> tuple[Difference, float]:
    """Dropped tokens against tokens hidden by minus infinity; and how much dropping them matters."""
    full = read(model, inputs).cache
    pruned = evict(full, random_selection(full, per_head=per_head))
    tokens = [*full.pending.tolist(), *NEW]
    ours = feed(model, pruned, tokens)
    total = full.length + len(tokens)
    hidden = []
    for layer in pruned:
        dropped = torch.ones(layer.heads, full.length, dtype=torch.bool).scatter(1, layer.positions, False)
        each = torch.zeros(layer.heads, total, total, dtype=torch.bool)
        each[:, full.length :, : full.length] = dropped[:, None]
        hidden.append(each)
    with reference(model, hidden), torch.no_grad():
        masked = model(**longer(inputs, NEW), use_cache=False).logits[0, full.length :].float()
    moved = apart(feed(model, full, tokens), ours, "").size
    return apart(ours, masked, "answer token"), moved


def random_selection(cache: KVCache, *, per_head: bool) -> Selection:
    """Another length in every layer; the same tokens in all heads of a layer, or others in each."""
    draw = torch.Generator().manual_seed(1)
    kept = []
    for index, layer in enumerate(cache):
        count = cache.length * (2 + index % 3) // 6
        scores = torch.rand(layer.heads if per_head else 1, cache.length, generator=draw)
        kept.append(scores.topk(count).indices.sort().values.expand(layer.heads, -1).contiguous())
    return Selection(tuple(kept), tuple(torch.zeros(x.shape) for x in kept))


def evidence_against_eager(model: PreTrainedModel, inputs: Inputs) -> Difference:
    """Column sums of attention as noted down while reading, against the weights of the family's own eager code."""
    prefilled = read(model, inputs, (ALL, QUESTION))
    with reference(model) as seen, torch.no_grad():
        model(**inputs, use_cache=False)
    worst = Difference(0.0, "layer 0")
    for request in (ALL, QUESTION):
        rows = torch.from_numpy(rows_of(request, prefilled.cache.layout))
        for layer in range(len(prefilled.cache.layers)):
            columns = prefilled.evidence.of(request, layer)
            if layer not in seen.weights:
                raise LookupError(f"the eager attention of layer {layer} returns no weights")
            weights = seen.weights[layer].view(len(columns), -1, *seen.weights[layer].shape[1:]).mean(1)
            expected = weights[:, rows].sum(1)[:, : columns.shape[1]]
            size = float((columns - expected).abs().max())
            worst = max(worst, Difference(size, f"layer {layer}"), key=lambda x: x.size)
    return worst


def resumed_against_continued(model: PreTrainedModel, inputs: Inputs) -> Difference:
    """A cache that was plain data in between, and another prompt read meanwhile, against stock ``generate()``."""
    said = generate(model, inputs)
    with compressing(model, "full"):
        within = generate(model, inputs)
    n = inputs["input_ids"].shape[1]
    cache = read(model, inputs).cache
    carried = replace(cache, layers=tuple(_copied(x) for x in cache))
    generate(model, {"input_ids": inputs["input_ids"].new_tensor([[5, 9, 31, 8]])}, 2)
    tokens = [*cache.pending.tolist(), *said.sequences[0, n:-1].tolist()]
    stock = torch.cat(said.logits).float()
    ours = apart(feed(model, carried, tokens, step=1), stock, "answer token")
    hooked = apart(torch.cat(within.logits).float(), stock, "answer token of generate()")
    return max(ours, hooked, key=lambda x: x.size)


def generate(model: PreTrainedModel, inputs: Inputs, count: int = STEPS) -> Any:
    """Greedy, with the logits before any processing."""
    return model.generate(
        **inputs, max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip


def longer(inputs: Inputs, tokens: tuple[int, ...]) -> Inputs:
    """The inputs with words behind."""
    n = inputs["input_ids"].shape[1]
    extended = dict(inputs)
    for name, value in inputs.items():
        if value.shape == (1, n) and not value.is_floating_point():
            extended[name] = torch.nn.functional.pad(value, (0, len(tokens)), value=int(name == "attention_mask"))
    extended["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    return extended


def apart(ours: torch.Tensor, stock: torch.Tensor, where: str) -> Difference:
    """Of logits ``[tokens, vocabulary]``."""
    spread = float(stock.std()) or 1.0
    by_token = (ours - stock).abs().amax(-1) / spread
    worst = int(by_token.argmax())
    size = float(by_token[worst])
    return Difference(size if size == size else float("inf"), f"{where} {worst}" if len(stock) > 1 else where)


def _copied(layer: LayerCache) -> LayerCache:
    keys, values, positions = (torch.from_numpy(x.numpy().copy()) for x in (layer.keys, layer.values, layer.positions))
    return LayerCache(keys, values, positions)
