"""Heads that keep differently many tokens: evicting equals masking, and memory falls for real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from kvferry.cache import KVCache, LayerCache
from kvferry.models import Decoder, compressing, continue_from, prefill_inputs
from kvferry.models.attention import Session, attached, session
from kvferry.models.cache_layers import RaggedLayer
from kvferry.models.resume import kept_layers
from kvferry.models.support import text_config, text_config_key
from kvferry.recipe import compress, decompress
from kvferry.selection import Selection, evict
from tests.models.families import build

FAMILIES = ["qwen2_vl", "qwen3_vl", "llava", "gemma3", "llama", "mistral", "gpt_neox"]
NEW = (7, 11, 13, 17, 19)

dropped: dict[int, torch.Tensor] = {}
"""What the masked references hide in each layer, bool ``[query_heads, rows, columns]``."""


def _eager(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling + mask
    logits[0].masked_fill_(dropped[module.layer_idx], -torch.inf)
    return (logits.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


def _sdpa(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    mask = mask.expand(-1, query.shape[1], -1, -1).masked_fill(dropped[module.layer_idx], -torch.inf)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)


for name, function in (("ragged_eager", _eager), ("ragged_sdpa", _sdpa)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)


@contextmanager
def using(model: Any, name: str) -> Iterator[None]:
    key, before = text_config_key(model), text_config(model)._attn_implementation
    model.set_attn_implementation(name if key is None else {key: name})
    yield
    model.set_attn_implementation(before if key is None else {key: before})


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[Any, dict[str, torch.Tensor]]:
    return build(str(request.param))


def ragged(cache: KVCache) -> Selection:
    """Another number of tokens in every layer and head; one head of layer 0 keeps none."""
    torch.manual_seed(0)
    positions, counts = [], []
    for index, layer in enumerate(cache):
        some = [(cache.length * (head + index) // (len(layer.keys) + 2)) for head in range(len(layer.keys))]
        heads = [torch.randperm(cache.length)[:count].sort().values for count in some]
        positions.append(torch.cat(heads)[None])
        counts.append(tuple(some))
    return Selection(tuple(positions), tuple(torch.zeros(x.shape) for x in positions), tuple(counts))


def hide(full: KVCache, pruned: KVCache, total: int, group: int) -> None:
    """Tell the references what ``pruned`` does not hold."""
    for index, layer in enumerate(pruned):
        mask = torch.zeros(layer.heads, total, total, dtype=torch.bool)
        for head, tokens in enumerate(layer.split()):
            gone = torch.ones(full.length, dtype=torch.bool).index_fill(0, tokens.positions[0], False)
            mask[head, full.length :, : full.length] = gone
        dropped[index] = mask.repeat_interleave(group, 0)


@pytest.mark.parametrize("reference", ["ragged_eager", "ragged_sdpa"])
@pytest.mark.parametrize("step", [1, 2, 6])
def test_evict_equals_mask(family: tuple[Any, dict[str, torch.Tensor]], step: int, reference: str) -> None:
    model, inputs = family
    full = prefill_inputs(model, inputs).cache
    pruned = evict(full, ragged(full))
    assert pruned.layers[0].counts[0] == 0
    tokens = [*full.pending.tolist(), *NEW]
    with attached(model):
        decoder = Decoder(model, pruned)
        got = torch.cat([decoder.feed(tokens[i : i + step], logits=step)[0] for i in range(0, len(tokens), step)])
    total = full.length + len(tokens)
    hide(full, pruned, total, text_config(model).num_attention_heads // full.layers[0].heads)
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([NEW])], dim=1)}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            longer[key] = torch.nn.functional.pad(inputs[key], (0, len(NEW)))
    with using(model, reference), torch.no_grad():
        expected = model(**longer).logits[0, full.length :]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_nothing_but_what_was_kept_stays_in_memory(family: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, inputs = family
    full = prefill_inputs(model, inputs).cache
    pruned = evict(full, ragged(full))
    entries = sum(sum(layer.per_head) for layer in pruned)
    assert pruned.nbytes * full.length * len(full.layers) * full.layers[0].heads == full.nbytes * entries
    assert pruned.full_bf16_bytes == full.full_bf16_bytes
    past = kept_layers(model, [pruned], pruned.length)
    assert all(isinstance(layer, RaggedLayer) for layer in past)
    for layer, kept in zip(past, pruned, strict=True):
        new = torch.ones(1, kept.heads, 3, kept.keys.shape[-1])
        with session(Session(kept=past)):
            keys, _ = layer.update(new, new)
        assert keys.shape[2] == max(kept.counts) + 3
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert layer.keys.shape == (1, 1, sum(kept.counts) + 3 * kept.heads, kept.keys.shape[-1])


def test_bytes_resume_the_same(family: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, inputs = family
    model = model.to(torch.bfloat16)
    try:
        pruned = evict(prefill_inputs(model, inputs).cache, ragged(prefill_inputs(model, inputs).cache))
        carried = decompress(compress(pruned, "full|bf16"))
        assert [x.counts for x in carried] == [x.counts for x in pruned]
        here = continue_from(model, pruned, max_new_tokens=8, stop=())
        assert continue_from(model, carried, max_new_tokens=8, stop=()).token_ids == here.token_ids
        assert continue_from(model, pruned, max_new_tokens=8, stop=()).token_ids == here.token_ids
    finally:
        model.float()


def test_generate_on_ragged_heads(family: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, inputs = family
    n = inputs["input_ids"].shape[1]
    with compressing(model, "snapkv@0.4,window=4,budget=head") as report:
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert said.shape[1] == n + 4
    heads = report.kept_per_head
    assert any(len(set(layer)) > 1 for layer in heads)
    for layer, kept in zip(heads, report.kept, strict=True):
        assert sum(layer) == len(layer) * kept
    assert report.bytes_after * n == report.bytes_before * report.kept[0]


def test_ragged_layers_split_and_join() -> None:
    keys = torch.arange(24.0).view(2, 4, 3)
    whole = LayerCache(keys, keys, torch.arange(4).expand(2, -1).contiguous())
    heads = [whole.split()[0].take(torch.tensor([[1, 3]])), whole.split()[1]]
    joined = LayerCache.join(heads)
    assert (joined.counts, joined.heads, joined.kept) == ((2, 4), 2, 3)
    for ours, theirs in zip(joined.split(), heads, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.positions, theirs.positions)
    assert torch.equal(LayerCache.join(whole.split()).values, keys)
    with pytest.raises(ValueError, match="counts"):
        replace(joined, counts=(3, 3))
    with pytest.raises(ValueError, match="counts"):
        replace(joined, counts=(2, 3))
