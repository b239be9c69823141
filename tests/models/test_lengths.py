"""What depends on how long a prompt is: a cache goes on as one that stayed, before, beyond and across that length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from kvferry.cache import KVCache
from kvferry.errors import UnsupportedModelError
from kvferry.evidence import EvidenceRequest
from kvferry.models import compressing, layout_of, prefill_inputs
from kvferry.models.attention import attached
from kvferry.models.prefill import read_prompt
from kvferry.models.resume import Decoder, continue_from
from tests.models.families import TEXT

LIMIT = 48
"""Where frequencies and scales of these models begin to change."""
ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LIMIT},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LIMIT,
    },
    "proportional": {"partial_rotary_factor": 0.5},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": LIMIT, "short_factor": [1.0] * 4,
        "long_factor": [3.0, 2.0, 4.0, 5.0],
    },
}  # fmt: skip


def build(kind: str, family: str = "Llama") -> Any:
    """A fresh model, whose rotary module has turned nothing yet."""
    text = {**TEXT, "max_position_embeddings": LIMIT if kind == "dynamic" else 512}
    rope = {"rope_theta": 1e4, "rope_type": kind, **ROPE[kind]}
    if family == "Ministral3":
        text |= {"head_dim": 8, "sliding_window": None}
        rope |= {"llama_4_scaling_beta": 0.9, "beta_fast": 32.0, "beta_slow": 1.0}
    if family in ("Phi3", "Phimoe"):
        text["original_max_position_embeddings"] = LIMIT
    if family == "Phimoe":
        text |= {"num_local_experts": 2, "num_experts_per_tok": 1}
        rope |= {"short_mscale": 1.1, "long_mscale": 1.4}
    torch.manual_seed(1)
    config = getattr(tf, f"{family}Config")(**text, rope_parameters=rope)
    model = getattr(tf, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight[0].numel() ** -0.5)
    return model


def words(count: int) -> torch.Tensor:
    return torch.randint(2, 80, (1, count), generator=torch.Generator().manual_seed(count))


def say(model: Any, ids: torch.Tensor, new: int) -> list[int]:
    said = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return said[0, ids.shape[1] :].tolist()


def resume(model: Any, cache: KVCache, new: int) -> list[int]:
    return list(continue_from(model, cache, max_new_tokens=new, stop=()).token_ids)


STAYING = [("Llama", kind, LIMIT - 4) for kind in ("linear", "yarn", "llama3", "proportional")]
CHANGING = [
    (*way, n) for way in (("Llama", "dynamic"), ("Ministral3", "yarn")) for n in (LIMIT - 4, LIMIT, LIMIT + 1, 144)
]


@pytest.mark.parametrize(("family", "kind", "length"), STAYING + CHANGING)
def test_a_cache_goes_on_as_one_that_stayed(family: str, kind: str, length: int) -> None:
    """On a machine that read nothing else, and on one that read a longer prompt before; ten tokens, across."""
    ids, longer = words(length), words(4 * LIMIT)
    stock = say(build(kind, family), ids, 10)
    used = build(kind, family)
    say(used, longer, 2)
    with compressing(used, "full"):
        say(used, longer, 2)
        assert say(used, ids, 10) == stock
    cache = prefill_inputs(used, {"input_ids": ids}).cache
    assert resume(build(kind, family), cache, 10) == stock
    assert resume(used, cache, 10) == stock


@pytest.mark.parametrize(
    ("family", "length"), [("Llama", LIMIT - 9), ("Phi3", LIMIT - 9), ("Phi3", LIMIT + 1), ("Phimoe", LIMIT + 1)]
)
def test_longrope_on_either_side(family: str, length: int) -> None:
    """The last token that is fed after the shorter prompts stands right below the limit."""
    ids = words(length)
    stock = say(build("longrope", family), ids, 10)
    used = build("longrope", family)
    with compressing(used, "full"):
        say(used, words(3 * LIMIT), 1)
        assert say(used, ids, 10) == stock
    cache = prefill_inputs(used, {"input_ids": ids}).cache
    assert resume(build("longrope", family), cache, 10) == stock


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_longrope_is_not_crossed(family: str) -> None:
    model, ids = build("longrope", family), words(LIMIT - 2)
    assert len(say(model, ids, 6)) == 6
    with compressing(model, "full"), pytest.raises(UnsupportedModelError, match="ask for fewer new tokens"):
        say(model, ids, 6)
    cache = prefill_inputs(model, {"input_ids": ids}).cache
    assert len(resume(model, cache, 3)) == 3
    with pytest.raises(UnsupportedModelError, match=r"beyond 48 tokens .* by other frequencies"):
        resume(model, cache, 4)
    with attached(model), pytest.raises(UnsupportedModelError, match="beyond 48 tokens"):
        Decoder(model, cache).feed([5, 6, 7, 8])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_prompts_of_one_batch_and_parts_of_one_prompt_are_turned_alike(kind: str) -> None:
    model, recipe = build(kind), "knorm@0.5"
    ids = torch.cat([words(2 * LIMIT), words(2 * LIMIT)])
    mask = torch.ones_like(ids)
    mask[1, : LIMIT + 5] = 0
    with pytest.raises(UnsupportedModelError, match=r"call generate\(\) for each"), compressing(model, recipe):
        model.generate(ids, attention_mask=mask, max_new_tokens=1, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match="leave prefill_chunk_size out"), compressing(model, recipe):
        model.generate(ids, prefill_chunk_size=16, max_new_tokens=1, pad_token_id=0)
    with compressing(model, recipe) as report:
        model.generate(ids, max_new_tokens=1, pad_token_id=0)
        assert [x.kept[0] for x in report.sequences] == [LIMIT, LIMIT]
        short = words(LIMIT - 3)
        model.generate(short, prefill_chunk_size=16, max_new_tokens=1, pad_token_id=0)
    assert report.prompt_tokens == LIMIT - 3


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_scene_is_turned_as_without_what_is_cut_off(kind: str) -> None:
    """A proxy question that reaches beyond the limit would turn the scene's keys otherwise."""
    model, requests = build(kind), [EvidenceRequest("all")]
    with attached(model):
        for total, right in ((LIMIT, True), (LIMIT + 4, False)):
            inputs = {"input_ids": words(total)}
            layout = layout_of(model, inputs)
            if right:
                found = read_prompt(model, inputs, layout, requests, length=40, fingerprint="", scene=True)
                assert found.cache.length == 40
            else:
                with pytest.raises(UnsupportedModelError, match="shorten the scene"):
                    read_prompt(model, inputs, layout, requests, length=40, fingerprint="", scene=True)


def test_scales_by_position_are_in_the_evidence() -> None:
    """Ministral 3 scales queries by where they stand: attention is that of the eager model."""
    model, ids = build("yarn", "Ministral3"), words(2 * LIMIT + 6)
    request = EvidenceRequest("all")
    seen = prefill_inputs(model, {"input_ids": ids}, [request])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    for layer, attention in enumerate(attentions):
        mean = attention[0].unflatten(0, (2, 2)).mean(1).sum(1)[:, : seen.cache.length]
        torch.testing.assert_close(seen.evidence.of(request, layer), mean, atol=1e-4, rtol=1e-4)
