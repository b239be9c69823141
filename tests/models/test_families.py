"""What must hold for every family: true evidence, evict equals mask, and the same tokens as stock generation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from kvferry.cache import KVCache, LayerCache
from kvferry.errors import InputError
from kvferry.evidence import EvidenceRequest
from kvferry.models import Decoder, compressing, continue_from, layout_of, prefill_inputs
from kvferry.models.attention import attached, rows_of
from kvferry.models.rotary import rotary_of
from kvferry.models.support import text_config, text_config_key
from kvferry.selection.base import Selection
from kvferry.selection.eviction import evict
from tests.models.families import FAMILIES, VISION, build

REQUESTS = (
    EvidenceRequest("question"),
    EvidenceRequest("question", layers="last"),
    EvidenceRequest("window", window=5),
    EvidenceRequest("post_vision"),
    EvidenceRequest("all"),
)
DENSITIES = (
    EvidenceRequest("post_vision", statistic="density"),
    EvidenceRequest("all", statistic="density", threshold=0.3),
    EvidenceRequest("window", window=5, layers="last", statistic="density", threshold=0.1),
)
NEW = (7, 11, 13, 17)

dropped: dict[int, torch.Tensor] = {}
"""What the masked reference hides in each layer, bool ``[query_heads, rows, columns]``."""


def _masked_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, softcap: float | None = None,
    s_aux: Any = None, **_: Any,
) -> Any:  # fmt: skip
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits + attention_mask
    logits[0].masked_fill_(dropped[module.layer_idx], -torch.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux[None, :, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    attention = logits.softmax(-1)[..., : key.shape[2]]
    return (attention @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("masked_reference", _masked_attention)
AttentionMaskInterface.register("masked_reference", eager_mask)


def use(model: Any, name: str) -> None:
    key = text_config_key(model)
    model.set_attn_implementation(name if key is None else {key: name})


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[Any, dict[str, torch.Tensor]]:
    return build(str(request.param))


def longer(inputs: dict[str, torch.Tensor], tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    extended = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            extended[name] = torch.nn.functional.pad(inputs[name], (0, len(tokens)))
    return extended


def uneven(cache: KVCache, *, per_head: bool) -> Selection:
    """A random selection with another length in every layer."""
    torch.manual_seed(0)
    kept = []
    for index, layer in enumerate(cache):
        count = cache.length * (2 + index) // 6
        scores = torch.rand(len(layer.keys) if per_head else 1, cache.length)
        positions = scores.topk(count).indices.sort().values.expand(len(layer.keys), -1)
        kept.append(positions.contiguous())
    return Selection(tuple(kept), tuple(torch.zeros(x.shape) for x in kept))


def test_evidence_equals_eager_attention(family: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, inputs = family
    prefilled = prefill_inputs(model, inputs, [*REQUESTS, *DENSITIES])
    before = text_config(model)._attn_implementation
    use(model, "eager")
    with torch.no_grad():
        seen = model(**inputs, output_attentions=True)
    use(model, before)
    heads = len(prefilled.cache.layers[0].keys)
    layout = prefilled.cache.layout
    for request in REQUESTS:
        rows = torch.from_numpy(rows_of(request, layout))
        observed = prefilled.evidence.column_sums[request]
        assert set(observed) == ({2} if request.layers == "last" else {0, 1, 2})
        for layer, columns in observed.items():
            attention = seen.attentions[layer][0]
            expected = attention.unflatten(0, (heads, -1)).mean(1)[:, rows].sum(1)[:, :-1]
            torch.testing.assert_close(columns, expected, atol=1e-4, rtol=1e-4)
    for request in DENSITIES:
        rows = torch.from_numpy(rows_of(request, layout))
        for layer, density in prefilled.evidence.column_sums[request].items():
            attention = seen.attentions[layer][0][:, rows]
            large = attention >= request.threshold * attention.amax(-1, keepdim=True)
            share = (large & (attention > 0)).sum((1, 2)) / (attention > 0).sum((1, 2))
            torch.testing.assert_close(density, share.view(heads, -1).mean(1), atol=2e-3, rtol=0)
    torch.testing.assert_close(prefilled.next_logits, seen.logits[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_evict_equals_mask(family: tuple[Any, dict[str, torch.Tensor]], per_head: bool, step: int) -> None:
    model, inputs = family
    full = prefill_inputs(model, inputs).cache
    pruned = evict(full, uneven(full, per_head=per_head))
    tokens = [*full.pending.tolist(), *NEW]
    with attached(model):
        decoder = Decoder(model, pruned)
        got = torch.cat([decoder.feed(tokens[i : i + step], logits=step)[0] for i in range(0, len(tokens), step)])

    group = text_config(model).num_attention_heads // len(full.layers[0].keys)
    total = full.length + len(tokens)
    for index, layer in enumerate(pruned):
        hidden = torch.ones(len(layer.keys), full.length, dtype=torch.bool).scatter(1, layer.positions, False)
        per_layer = torch.zeros(len(layer.keys), total, total, dtype=torch.bool)
        per_layer[:, full.length :, : full.length] = hidden[:, None]
        dropped[index] = per_layer.repeat_interleave(group, 0)
    before = text_config(model)._attn_implementation
    use(model, "masked_reference")
    with torch.no_grad():
        expected = model(**longer(inputs, NEW)).logits[0, full.length :]
    use(model, before)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    with attached(model):
        assert (Decoder(model, full).feed(tokens, logits=len(tokens))[0] - got).abs().max() > 1e-2


def test_keeping_everything_is_stock_generation(family: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, inputs = family
    n = inputs["input_ids"].shape[1]
    wanted = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    stock = model.generate(**inputs, **wanted)[0, n:].tolist()
    before = text_config(model)._attn_implementation
    with compressing(model, "full") as report:
        assert model.generate(**inputs, **wanted)[0, n:].tolist() == stock
    assert report.kept == (n, n, n)
    assert report.bytes_after == report.bytes_before > 0
    assert text_config(model)._attn_implementation == before
    cache = prefill_inputs(model, inputs).cache
    assert list(continue_from(model, cache, max_new_tokens=12, stop=()).token_ids) == stock


@pytest.mark.parametrize("recipe", ["q2c@0.5|int8", "expected_attention@0.5"])
def test_compressing_frees_what_it_drops(family: tuple[Any, dict[str, torch.Tensor]], recipe: str) -> None:
    model, inputs = family
    n = inputs["input_ids"].shape[1]
    with compressing(model, recipe) as report:
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert said.shape[1] == n + 4
    assert set(report.kept) == {(n + 1) // 2}
    assert report.bytes_after * n == report.bytes_before * report.kept[0]


def test_plain_tensors_resume_the_same(family: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, inputs = family
    full = prefill_inputs(model, inputs).cache
    pruned = evict(full, uneven(full, per_head=True))
    carried = replace(pruned, layers=tuple(_through_numpy(x) for x in pruned))
    here = continue_from(model, pruned, max_new_tokens=8, stop=())
    assert continue_from(model, carried, max_new_tokens=8, stop=()).token_ids == here.token_ids
    assert continue_from(model, pruned, max_new_tokens=8, stop=()).token_ids == here.token_ids
    assert pruned.kept == carried.kept


def _through_numpy(layer: LayerCache) -> LayerCache:
    return LayerCache(*(torch.from_numpy(np.array(x.numpy())) for x in (layer.keys, layer.values, layer.positions)))


@pytest.mark.parametrize("name", VISION)
def test_layout_knows_the_pictures(name: str) -> None:
    model, inputs = build(name)
    layout = layout_of(model, inputs)
    assert layout.visual.sum() == (inputs["input_ids"] == 90).sum()
    assert layout.question[np.flatnonzero(layout.visual)[-1] + 1 :].all()
    if layout.grids:
        assert sum(f * r * c for f, r, c in layout.grids) == layout.visual.sum()
    assert bool(layout.grids) == (name.startswith("qwen") or name in ("llava", "gemma3"))
    assert layout.positions.shape[0] == (3 if name.startswith("qwen") else 1)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_videos_are_stock_generation(name: str) -> None:
    """Three merged frames of 2 x 2 tokens; Qwen3-VL writes a time stamp before each."""
    model, _ = build(name)
    frame = torch.full((4,), 91)
    between = torch.tensor([5, 6]) if name == "qwen3_vl" else torch.tensor([], dtype=torch.long)
    words = torch.tensor([3, 4, 7, 8, 9])
    ids = torch.cat([words, *[x for _ in range(3) for x in (between, frame)], words])[None]
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == 91).long(),
        "pixel_values_videos": torch.randn(3 * 16, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[3, 4, 4]]),
    }
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :]
    cache = prefill_inputs(model, inputs).cache
    assert continue_from(model, cache, max_new_tokens=6, stop=()).token_ids == tuple(said.tolist())
    assert cache.layout.grids == (((1, 2, 2),) * 3 if name == "qwen3_vl" else ((3, 2, 2),))
    assert set(cache.layout.modality.tolist()) == {0, 2}


@pytest.mark.parametrize(("name", "module"), [("qwen2_vl", "q_proj"), ("qwen3_vl", "q_norm"), ("gemma3", "q_norm")])
def test_coming_queries_are_the_models_own_before_rotation(name: str, module: str) -> None:
    """With one position to come, the mean rotation is that position's."""
    model, inputs = build(name)
    attention = model.get_decoder().layers[1].self_attn
    caught: list[torch.Tensor] = []
    hook = getattr(attention, module).register_forward_hook(lambda *args: caught.append(args[-1].clone()))
    request = EvidenceRequest("all", statistic="queries", horizon=1)
    prefilled = prefill_inputs(model, inputs, [request])
    hook.remove()
    straight = caught[0][0].view(-1, 4, 8).transpose(0, 1) if module == "q_proj" else caught[0][0]
    straight = straight if straight.shape[0] == 4 else straight.transpose(0, 1)
    layout, rotary = prefilled.cache.layout, rotary_of(model)[1]
    assert rotary is not None
    mean = straight[:, 4:].mean(1, keepdim=True) * attention.scaling
    expected = rotary.rotate(mean, torch.tensor([[layout.next_position]]))
    got = prefilled.evidence.of(request, 1)
    assert got.shape == (4, 9, 8)
    torch.testing.assert_close(got[:, :1], expected, atol=1e-4, rtol=1e-4)


def test_construction_time_is_a_mask_from_the_first_row(family: tuple[Any, dict[str, torch.Tensor]]) -> None:
    """Against attention written out with that mask: keys, values and the first answer token's logits."""
    model, inputs = family
    plain = prefill_inputs(model, inputs, [EvidenceRequest("all")])
    selection = uneven(plain.cache, per_head=True)
    built = prefill_inputs(model, inputs, [EvidenceRequest("all")], construct=selection)
    assert built.cache.kept == tuple(x.shape[1] for x in selection.positions)

    n, length = inputs["input_ids"].shape[1], plain.cache.length
    heads = len(plain.cache.layers[0].keys)
    group = text_config(model).num_attention_heads // heads
    for index, kept in enumerate(selection.positions):
        hidden = (torch.arange(n) < length).repeat(heads, 1).scatter(1, kept, False)
        others = ~torch.eye(n, dtype=torch.bool)
        dropped[index] = (hidden[:, None] & others).repeat_interleave(group, 0)
    before = text_config(model)._attn_implementation
    use(model, "masked_reference")
    past = DynamicCache()
    with torch.no_grad():
        logits = model(**inputs, past_key_values=past, use_cache=True).logits[0, -1]
    use(model, before)
    torch.testing.assert_close(built.next_logits, logits, atol=1e-4, rtol=1e-4)
    moved = 0.0
    for layer, reference, evicted in zip(built.cache, past.layers, evict(plain.cache, selection), strict=True):
        for got, expected in ((layer.keys, reference.keys), (layer.values, reference.values)):
            expected = expected[0].gather(1, layer.positions[..., None].expand(-1, -1, got.shape[-1]))
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        moved = max(moved, float((layer.keys - evicted.keys).abs().max()))
    assert moved > 1e-2
    with attached(model):
        resumed = Decoder(model, built.cache).feed(built.cache.pending.tolist())[0, 0]
    torch.testing.assert_close(resumed, built.next_logits, atol=1e-4, rtol=1e-4)


def test_constructing_with_everything_is_plain_prefill(family: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, inputs = family
    plain = prefill_inputs(model, inputs, REQUESTS)
    everything = Selection(
        tuple(x.positions for x in plain.cache), tuple(torch.zeros(x.positions.shape) for x in plain.cache)
    )
    built = prefill_inputs(model, inputs, REQUESTS, construct=everything)
    torch.testing.assert_close(built.next_logits, plain.next_logits, atol=1e-4, rtol=1e-4)
    for a, b in zip(built.cache, plain.cache, strict=True):
        assert torch.equal(a.positions, b.positions)
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.values, b.values, atol=1e-4, rtol=1e-4)
    for request in REQUESTS:
        torch.testing.assert_close(built.evidence.of(request, 2), plain.evidence.of(request, 2), atol=1e-3, rtol=1e-4)


def test_a_selection_of_something_else_is_refused() -> None:
    model, inputs = build("llama")
    full = prefill_inputs(model, inputs).cache
    selection = uneven(full, per_head=True)
    with pytest.raises(InputError, match="3 layers of 2 KV heads"):
        prefill_inputs(model, inputs, construct=replace(selection, positions=selection.positions[:2]))
    with pytest.raises(InputError, match="3 layers of 2 KV heads"):
        prefill_inputs(model, inputs, construct=replace(selection, positions=(selection.positions[0][:1],) * 3))
    with pytest.raises(InputError, match="beyond the prompt's 39"):
        prefill_inputs(model, inputs, construct=replace(selection, positions=(torch.tensor([[0], [39]]),) * 3))
