"""Options of ``generate()``, plain forward passes and prompts read in parts: right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from transformers.cache_utils import DynamicCache

from kvferry.errors import UnsupportedModelError
from kvferry.models import Report, compressing
from kvferry.models.cache_layers import KeptLayer
from tests.models.families import build
from tests.models.test_compressing import prompts, together

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
RECIPE = "snapkv@0.4,window=4"
TOKENS, KEPT = 40, (16, 16, 16)
"""Of the prompt that :func:`build` makes for a language model, and what :data:`RECIPE` keeps of it in each layer."""


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")[0]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return build("llama")[1]["input_ids"].flip(1)


@pytest.fixture(scope="module")
def answer(model: Any, ids: torch.Tensor) -> list[int]:
    """What a plain call says on the compressed cache."""
    said, report = run(model, ids)
    assert (report.prompt_tokens, report.kept) == (TOKENS, KEPT)
    return said


def run(model: Any, ids: torch.Tensor, **more: Any) -> tuple[list[int], Report]:
    with compressing(model, RECIPE) as report:
        said = model.generate(input_ids=ids, **{**GREEDY, **more})
    return said[0, ids.shape[1] :].tolist(), report


def test_a_plain_forward_pass(model: Any, ids: torch.Tensor) -> None:
    """With and without a cache of one's own; arguments by name and by position."""
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with compressing(model, RECIPE) as report, torch.no_grad():
        for given in ({}, {"use_cache": True}, {"past_key_values": DynamicCache()}):
            past = model(ids, **given).past_key_values
            assert all(isinstance(x, KeptLayer) for x in past.layers)
            assert report.kept == KEPT
        model(ids, mask)
        assert report.prompt_tokens == TOKENS - 5
        with pytest.raises(UnsupportedModelError, match="use_cache=False does not go"):
            model(ids, use_cache=False)
        with pytest.raises(UnsupportedModelError, match="output_attentions=True does not go"):
            model(ids, output_attentions=True)


def test_a_decoding_loop_of_ones_own(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    def loop(model: Any, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> torch.Tensor:
        new = input_ids
        for _ in range(5):
            new = model(new, past_key_values=past_key_values).logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, new], 1)
        return input_ids

    with torch.no_grad():
        said, report = run(model, ids, custom_generate=loop)
    assert (said, report.kept) == (answer, KEPT)


def test_options_that_change_nothing(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    for option in ({"cache_implementation": "dynamic"}, {"guidance_scale": 1.0}, {"use_cache": True}):
        said, report = run(model, ids, **option)
        assert (said, report.kept) == (answer, KEPT)
    wanted = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True}
    with compressing(model, RECIPE):
        said = model.generate(ids, **wanted, **GREEDY)
    assert said.sequences[0, TOKENS:].tolist() == answer
    assert len(said.hidden_states) == len(said.scores) == 5


@pytest.mark.parametrize(
    "option",
    [
        {"assistant_early_exit": 1},
        {"prompt_lookup_num_tokens": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"guidance_scale": 1.5},
        {"use_cache": False},
        *({"cache_implementation": x} for x in ("static", "offloaded", "quantized", "paged")),
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
    ids=lambda x: next(iter(x)),
)
def test_options_that_are_refused(model: Any, ids: torch.Tensor, option: dict[str, Any]) -> None:
    """By name and before anything runs, whether they are given here, in a configuration, or in the model's own."""
    before = {**vars(model)}
    name = f"{next(iter(option))} does not go with compressing"
    with pytest.raises(UnsupportedModelError, match=name):
        run(model, ids, **option)
    config = tf.GenerationConfig(**option)
    with pytest.raises(UnsupportedModelError, match=name):
        run(model, ids, generation_config=config)
    own, model.generation_config = model.generation_config, config
    try:
        with pytest.raises(UnsupportedModelError, match=name):
            run(model, ids)
    finally:
        model.generation_config = own
    assert {**vars(model)} == before
    assert (model.config.num_hidden_layers, model.config._attn_implementation) == (3, "sdpa")


def test_other_ways_that_are_refused(model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="assistant_model does not go"):
        run(model, ids, assistant_model=build("llama")[0])
    with pytest.raises(UnsupportedModelError, match="generate_batch keeps a paged"), compressing(model, RECIPE):
        model.generate_batch([ids[0].tolist()])
    with pytest.raises(UnsupportedModelError, match="a tuple cannot be compressed"), compressing(model, RECIPE):
        model(ids, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(UnsupportedModelError, match="filled elsewhere"), torch.no_grad():
        run(model, ids, past_key_values=model(ids[:, :7]).past_key_values)
    eager = build("llama")[0]
    eager.set_attn_implementation("eager")
    eager.config.output_attentions = True
    with pytest.raises(UnsupportedModelError, match="output_attentions=True does not go"):
        run(eager, ids)


SCORED = [
    "snapkv@0.4,window=4", "q2c@0.4", "h2o@0.4", "vlcache@0.4,budget=sparsity", "expected_attention@0.4",
    "snapkv@0.4,window=4,budget=head",
]  # fmt: skip
"""Evidence of every statistic: column sums of few and of all rows, densities, queries to come."""


@pytest.mark.parametrize("recipe", SCORED)
def test_a_prompt_read_in_parts_is_the_prompt_read_at_once(model: Any, ids: torch.Tensor, recipe: str) -> None:
    wanted = {**GREEDY, "return_dict_in_generate": True}
    with compressing(model, recipe) as once:
        expected = model.generate(ids, **wanted)
    for step in (1, 16, 40):
        with compressing(model, recipe) as report:
            said = model.generate(ids, prefill_chunk_size=step, **wanted)
        assert report == once
        assert said.sequences.tolist() == expected.sequences.tolist()
        for ours, theirs in zip(said.past_key_values.layers, expected.past_key_values.layers, strict=True):
            assert ours.positions.tolist() == theirs.positions.tolist()


def test_the_classs_own_generate_reads_in_parts_too(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    with compressing(model, RECIPE) as report:
        said = tf.LlamaForCausalLM.generate(model, ids, prefill_chunk_size=16, **GREEDY)
    assert (said[0, TOKENS:].tolist(), report.prompt_tokens, report.kept) == (answer, TOKENS, KEPT)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gpt_oss"])
def test_a_batch_read_in_parts(family: str) -> None:
    """With padding longer than a part, sliding windows, soft caps and sink logits; beams and a further turn too."""
    model, batch = build(family)[0], together(prompts(family))
    recipe = "h2o@0.4,budget=sparsity" if family == "qwen2" else "snapkv@0.4,window=4"
    for more in ({}, {"num_beams": 2}) if family == "qwen2" else ({},):
        said, reports = [], []
        for step in (None, 7):
            wanted = {**GREEDY, "prefill_chunk_size": step, "return_dict_in_generate": True, **more}
            with compressing(model, recipe) as report:
                first = model.generate(**batch, **wanted)
                ids = torch.cat([first.sequences, batch["input_ids"][:, -9:]], dim=1)
                new = ids.shape[1] - batch["input_ids"].shape[1]
                mask = torch.nn.functional.pad(batch["attention_mask"], (0, new), value=1)
                turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
                again = first if more else model.generate(**turn, **{**wanted, "prefill_chunk_size": None})
            said.append(again.sequences.tolist())
            reports.append(report)
        assert said[0] == said[1]
        assert reports[0] == reports[1]
