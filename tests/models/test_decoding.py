"""A bounded cache while the answer grows: stock generation where it is large, and never more than it may hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import kvferry
from kvferry.errors import InputError, RecipeError, UnsupportedModelError
from kvferry.models import Decoding, compressing
from kvferry.models.cache_layers import KeptLayer, RaggedLayer
from kvferry.models.decoding import check_decoding
from tests.models.families import IMAGE, build
from tests.models.test_compressing import Inputs, further, positions, prompts, together, use, words

LONG = {
    "max_new_tokens": 40, "do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True,
    "suppress_tokens": [IMAGE, 91],
}  # fmt: skip
Held = list[list[list[list[int]]]]
"""After each pass, per layer and head: the positions that are held."""


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: build(name)[0] for name in ("qwen2", "qwen2_vl", "llava", "mistral", "gpt_oss")}


class Watch:
    """A logits processor that looks at the cache after every pass."""

    def __init__(self) -> None:
        self.past = DynamicCache()
        self.held: Held = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        layers: Sequence[KeptLayer] = self.past.layers
        self.held.append([positions(x, 0, 0) for x in layers])
        for layer in layers:
            entries = sum(layer.counts) if isinstance(layer, RaggedLayer) else layer.positions.numel()
            assert layer.keys.numel() == layer.values.numel() == entries * layer.keys.shape[-1]
            assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        return scores


def said(model: Any, inputs: Inputs, recipe: str, decoding: Decoding | None) -> tuple[Any, Watch, Any]:
    watch = Watch()
    with compressing(model, recipe, decoding=decoding) as report:
        out = model.generate(**inputs, **LONG, past_key_values=watch.past, logits_processor=[watch], output_logits=True)
    return out, watch, report


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "llava", "mistral", "gpt_oss"])
def test_a_bound_that_is_not_reached_is_stock_generation(models: dict[str, Any], family: str) -> None:
    model, inputs = models[family], prompts(family)[0]
    stock = model.generate(**inputs, **LONG).sequences.tolist()
    n = len(stock[0])
    out, watch, report = said(model, inputs, "full", Decoding(n, every=5))
    assert out.sequences.tolist() == stock
    assert report.selections == 0
    assert report.longest == len(watch.held[-1][0][0]) == n - 1


@pytest.mark.parametrize("recipe", ["full", "snapkv@0.6,window=4,budget=head", "knorm@0.5|int8"])
@pytest.mark.parametrize("scorer", ["snapkv,kernel=1", "h2o", "keydiff", "streaming"])
def test_no_head_ever_holds_more(models: dict[str, Any], recipe: str, scorer: str) -> None:
    model, inputs = models["qwen2_vl"], prompts("qwen2_vl")[0]
    out, watch, report = said(model, inputs, recipe, Decoding(20, every=6, scorer=scorer))
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 40
    counts = [len(head) for step in watch.held for layer in step for head in layer]
    assert report.longest == max(counts) == 20
    assert report.selections >= 40 // 7
    steps = list(zip(watch.held, watch.held[1:], strict=False))
    for before, after in steps:
        for was, now in zip(chain(*before), chain(*after), strict=True):
            assert set(now) <= {*was, max(now)}, "nothing that went comes back"
            assert now == sorted(now)
            assert now[:4] == was[:4]
    ends = [max(head) for step in watch.held for layer in step for head in layer]
    assert max(ends) == out.sequences.shape[1] - 2, "the logical length goes on"


def masked(model: Any, inputs: Inputs, answer: list[int], held: Held) -> torch.Tensor:
    """Logits of one full pass in which each answer token sees exactly what its head held then."""
    n = inputs["input_ids"].shape[1]
    total = n + len(answer) - 1

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        seen = torch.ones(total, total, dtype=torch.bool).tril().repeat(heads, 1, 1)
        if (window := kwargs.get("sliding_window")) is not None:
            seen &= ~torch.ones(total, total, dtype=torch.bool).tril(-window)
        for row in range(n, total):
            for head in range(heads):
                before = torch.zeros(total, dtype=torch.bool)
                before[[*held[row - n][module.layer_idx][head], row]] = True
                seen[head, row] &= before
        logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        logits = logits.masked_fill(~seen.repeat_interleave(group, 0), -torch.inf)
        return (logits.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register("masked", attend)
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]])], 1)}
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(answer) - 1))
    use(model, "masked")
    try:
        with torch.no_grad():
            return model(**longer, use_cache=False).logits[0, n - 1 :]
    finally:
        use(model, "sdpa")


@pytest.mark.parametrize("recipe", ["full", "snapkv@0.6,window=4,budget=head"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "llava", "mistral"])
def test_evicting_is_masking(models: dict[str, Any], family: str, recipe: str) -> None:
    model, inputs = models[family], prompts(family)[0]
    out, watch, report = said(model, inputs, recipe, Decoding(16, every=5))
    assert report.selections > 3
    answer = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    expected = masked(model, inputs, answer, watch.held)
    found = torch.cat(out.logits)
    assert (found - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.parametrize("recipe", ["vlcache@0.6", "snapkv@0.6,window=4,budget=head"])
@pytest.mark.parametrize("family", ["qwen2_vl", "gpt_oss"])
def test_a_batch_is_its_prompts_alone(models: dict[str, Any], family: str, recipe: str) -> None:
    model, alone = models[family], prompts(family)
    batch, decoding = together(alone), Decoding(18, every=8)
    n = batch["input_ids"].shape[1]
    with compressing(model, recipe, decoding=decoding) as report:
        out = model.generate(**batch, **LONG)
    assert report.longest == 18
    for row, inputs in enumerate(alone):
        single, _, _ = said(model, inputs, recipe, decoding)
        own = inputs["input_ids"].shape[1]
        assert out.sequences[row, n:].tolist() == single.sequences[0, own:].tolist()
        for ours, theirs in zip(out.past_key_values.layers, single.past_key_values.layers, strict=True):
            assert positions(ours, row, n - own) == positions(theirs, 0, 0)


def test_many_turns(models: dict[str, Any]) -> None:
    """Also a question longer than the bound; and a block without one goes on from there, and another with one."""
    model, inputs = models["qwen2_vl"], prompts("qwen2_vl")[0]
    torch.manual_seed(9)
    mask = torch.ones_like(inputs["input_ids"])
    with compressing(model, "full", decoding=Decoding(24, every=8)) as report:
        out = model.generate(**inputs, **LONG)
        for size in (3, 30, 5):
            out = model.generate(**further(out, mask, words(size)[None], inputs), **LONG)
            assert all(layer.longest <= 24 for layer in out.past_key_values.layers)
            assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    assert report.longest == 24
    with compressing(model, "full"):
        out = model.generate(**further(out, mask, words(3)[None], inputs), **LONG)
    assert out.past_key_values.layers[0].longest > 60
    with compressing(model, "full", decoding=Decoding(24, every=8)):
        out = model.generate(**further(out, mask, words(1)[None], inputs), **{**LONG, "max_new_tokens": 1})
    layer = out.past_key_values.layers[0]
    assert (layer.longest, layer.newest.shape[2]) == (16, 2), "queries from before the gap are forgotten"


@pytest.mark.parametrize("recipe", ["full", "snapkv@0.6,window=4,budget=head"])
def test_beams(models: dict[str, Any], recipe: str) -> None:
    model, inputs = models["qwen2"], prompts("qwen2")[0]
    beams = {**LONG, "num_beams": 3}
    stock = model.generate(**inputs, **beams).sequences.tolist()
    with compressing(model, "full", decoding=Decoding(len(stock[0]), every=5)):
        assert model.generate(**inputs, **beams).sequences.tolist() == stock
    with compressing(model, recipe, decoding=Decoding(16, every=5)) as report:
        model.generate(**inputs, **beams)
    assert report.longest == 16


def test_refusals(models: dict[str, Any]) -> None:
    for tokens, every in ((20, 16), (20, 0), (4, 30)):
        with pytest.raises(InputError, match="leaves nothing to choose"):
            Decoding(tokens, every)
    for scorer, says in {
        "q2c": "the question", "expected_attention": "coming queries", "snapkv@0.5": "scorer and its options only",
        "knorm,budget=head": "for prompts", "nobody": "there is no selection 'nobody'", "full": "takes no fraction",
    }.items():  # fmt: skip
        with pytest.raises(RecipeError, match=says):
            Decoding(40, 8, scorer)
    with pytest.raises(InputError, match=r"kvferry\.Decoding"):
        compressing(models["qwen2"], "full", decoding=40)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="mixes the heads"):
        check_decoding(kvferry.Decoding(40), tied=True)
    model, alone = models["qwen2"], prompts("qwen2")[:2]
    batch = together(alone)
    with compressing(model, "full", decoding=Decoding(20, 8)):
        out = model.generate(**batch, **LONG)
        turn = further(out, batch["attention_mask"], words(6).view(2, 3), batch)
        turn["attention_mask"][0, -3] = 0
        with pytest.raises(UnsupportedModelError, match="padding behind a prompt"):
            model.generate(**turn, **LONG)
