"""What cannot be served correctly is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from kvferry.errors import InputError, UnsupportedModelError
from kvferry.models import compressing, layout_of, prefill_inputs
from kvferry.models.cache_layers import KeptLayer
from tests.models.families import TEXT, build


def bart() -> Any:
    config = tf.BartConfig(vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                           decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip
    return tf.BartForConditionalGeneration(config)


def mamba() -> Any:
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4))


def deepseek() -> Any:
    config = tf.DeepseekV3Config(**TEXT, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
                                 v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
                                 moe_intermediate_size=16)  # fmt: skip
    return tf.DeepseekV3ForCausalLM(config)


def qwen3_next() -> Any:
    config = tf.Qwen3NextConfig(**TEXT, head_dim=8, num_experts=2, num_experts_per_tok=1, linear_num_value_heads=2,
                                linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                                moe_intermediate_size=16, shared_expert_intermediate_size=16)  # fmt: skip
    return tf.Qwen3NextForCausalLM(config)


def llama4() -> Any:
    config = tf.Llama4TextConfig(**TEXT, head_dim=8, num_local_experts=2, intermediate_size_mlp=16)
    return tf.Llama4ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bart, "encoder-decoder"),
        (mamba, "recurrent"),
        (deepseek, "latent attention"),
        (qwen3_next, "linear_attention|recurrent"),
        (llama4, "chunked_attention"),
    ],
)
def test_families_are_refused_by_name(make: Any, reason: str) -> None:
    model = make()
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    name = model.config.model_type
    with pytest.raises(UnsupportedModelError, match=f"{name} models cannot be served: .*({reason})"):
        prefill_inputs(model, inputs)
    with pytest.raises(UnsupportedModelError, match=reason), compressing(model, "knorm@0.5"):
        pass


@pytest.fixture(scope="module")
def llama() -> tuple[Any, torch.Tensor]:
    model, inputs = build("llama")
    return model, inputs["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"cache_implementation": "static"}, "cannot be compressed"),
        ({"use_cache": False}, "use_cache=True"),
        ({"prompt_lookup_num_tokens": 2}, "rolled back"),
    ],
)
def test_ways_of_generating_are_refused(
    llama: tuple[Any, torch.Tensor], arguments: dict[str, Any], reason: str
) -> None:
    model, ids = llama
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason), compressing(model, "knorm@0.5"):
        model.generate(ids, max_new_tokens=6, **arguments)
    assert model.config._attn_implementation == before
    assert model.generate(ids, max_new_tokens=2, **arguments).shape[1] > ids.shape[1]


def test_layouts_are_of_one_prompt_without_padding(llama: tuple[Any, torch.Tensor]) -> None:
    model, ids = llama
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    with pytest.raises(UnsupportedModelError, match="one prompt"):
        layout_of(model, {"input_ids": ids.repeat(2, 1)})
    with pytest.raises(UnsupportedModelError, match="without padding"):
        prefill_inputs(model, {"input_ids": ids, "attention_mask": padded})
    with pytest.raises(InputError, match="input_ids"):
        layout_of(model, {})
    with pytest.raises(InputError, match="question_mask"):
        layout_of(model, {"input_ids": ids}, [True])
    with pytest.raises(InputError, match="question_tokens"), compressing(model, "q2c@0.5", question_tokens=0):
        pass


def test_question_tokens_choose_the_rows(llama: tuple[Any, torch.Tensor]) -> None:
    model, ids = llama
    with compressing(model, "q2c@0.5", question_tokens=3) as report:
        model.generate(ids, max_new_tokens=2)
    assert report.kept == (20, 20, 20)
    assert layout_of(model, {"input_ids": ids}).question.sum() == 32


def test_two_prompts_in_one_block(llama: tuple[Any, torch.Tensor]) -> None:
    model, ids = llama
    with compressing(model, "knorm@0.5") as report:
        model.generate(ids, max_new_tokens=2)
        first = report.kept
        said = model.generate(ids[:, :20], max_new_tokens=2, return_dict_in_generate=True)
    assert (first[0], report.kept[0], report.prompt_tokens) == (20, 10, 20)
    assert all(isinstance(x, KeptLayer) for x in said.past_key_values.layers)
