"""Tiny random models of every supported family, with one prompt each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

VOCABULARY, IMAGE, END = 96, 90, 95
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": END,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

Built = tuple[Any, dict[str, torch.Tensor]]


def _prompt(visual: int, *, before: int = 5, after: int = 11) -> torch.Tensor:
    words = torch.randint(2, 80, (before + after,))
    pictures = torch.full((visual,), IMAGE)
    return torch.cat([words[:before], pictures, words[before:]])[None]


def _qwen_inputs(side: int, patch_values: int) -> dict[str, torch.Tensor]:
    """Two pictures of ``side x side`` and ``side x (side + 2)`` patches, merged two by two."""
    ids = [_prompt(side * side // 4), _prompt(side * (side + 2) // 4, before=2)]
    input_ids = torch.cat(ids, dim=1)
    return {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == IMAGE).long(),
        "pixel_values": torch.randn(side * side + side * (side + 2), patch_values),
        "image_grid_thw": torch.tensor([[1, side, side], [1, side, side + 2]]),
    }


def _with_special(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "image_token_id": IMAGE, "video_token_id": 91}


def qwen2_vl() -> Built:
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 4}
    config = tf.Qwen2VLConfig(
        **_with_special({"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": vision}),
        vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config), _qwen_inputs(6, 3 * 2 * 4 * 4)


def qwen2_5_vl() -> Built:
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = tf.Qwen2_5_VLConfig(
        **_with_special({"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": vision}),
        vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(config), _qwen_inputs(6, 3 * 2 * 4 * 4)


def qwen3_vl() -> Built:
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32,
        "patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    config = tf.Qwen3VLConfig(
        **_with_special({"text_config": text, "vision_config": vision}),
        vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return tf.Qwen3VLForConditionalGeneration(config), _qwen_inputs(6, 3 * 2 * 4 * 4)


def llava() -> Built:
    vision = {"model_type": "clip_vision_model", "image_size": 16, "projection_dim": 16, **TOWER}
    config = tf.LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_id=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    inputs = {"input_ids": _prompt(16), "pixel_values": torch.randn(1, 3, 16, 16)}
    return tf.LlavaForConditionalGeneration(config), inputs


def llava_onevision() -> Built:
    vision = {"model_type": "siglip_vision_model", "image_size": 16, **TOWER}
    config = tf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT}, vision_config=vision, image_token_id=IMAGE, video_token_id=91,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=[[16, 16], [16, 32]],
    )  # fmt: skip
    inputs = {
        "input_ids": _prompt(16 + 4 * (4 + 1)),
        "pixel_values": torch.randn(1, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]]),
    }
    return tf.LlavaOnevisionForConditionalGeneration(config), inputs


def _idefics(config_class: Any, model_class: Any) -> Built:
    vision = {"image_size": 16, **TOWER}
    config = config_class(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_id=IMAGE, scale_factor=2,
        pad_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": _prompt(2 * 4), "pixel_values": torch.randn(1, 2, 3, 16, 16)}
    return model_class(config), inputs


def smolvlm() -> Built:
    return _idefics(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)


def idefics3() -> Built:
    return _idefics(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration)


def internvl() -> Built:
    vision = {**TOWER, "image_size": (16, 16), "patch_size": (4, 4)}
    config = tf.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT}, vision_config=vision, image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    inputs = {"input_ids": _prompt(2 * 4), "pixel_values": torch.randn(2, 3, 16, 16)}
    return tf.InternVLForConditionalGeneration(config), inputs


def gemma3() -> Built:
    """Sliding layers shorter than the prompt; the tokens of a picture see each other in both directions."""
    text = {
        **TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 12,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    config = tf.Gemma3Config(
        text_config=text, vision_config={**TOWER, "image_size": 16}, image_token_index=IMAGE, mm_tokens_per_image=4,
        boi_token_index=92, eoi_token_index=93,
    )  # fmt: skip
    ids = torch.cat([_prompt(4), _prompt(4, before=2)], dim=1)
    inputs = {
        "input_ids": ids,
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }
    return tf.Gemma3ForConditionalGeneration(config), inputs


def _text(model_class: Any, config: Any) -> Built:
    return model_class(config), {"input_ids": _prompt(0, before=20, after=20)}


def qwen2() -> Built:
    return _text(tf.Qwen2ForCausalLM, tf.Qwen2Config(**TEXT))


def llama() -> Built:
    return _text(tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT))


def mistral() -> Built:
    """A sliding window shorter than the prompt."""
    return _text(tf.MistralForCausalLM, tf.MistralConfig(**TEXT, sliding_window=16))


def phi3() -> Built:
    return _text(tf.Phi3ForCausalLM, tf.Phi3Config(**TEXT, sliding_window=24))


def gpt_neox() -> Built:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return _text(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**text, rotary_pct=0.5))


def gemma2() -> Built:
    """Soft-capped logits, and a sliding layer shorter than the prompt."""
    config = tf.Gemma2Config(
        **TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=12, attn_logit_softcapping=2.0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return _text(tf.Gemma2ForCausalLM, config)


def gpt_oss() -> Built:
    """Sink logits, and a sliding layer shorter than the prompt."""
    config = tf.GptOssConfig(
        **TEXT, head_dim=8, sliding_window=12, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return _text(tf.GptOssForCausalLM, config)


def cohere() -> Built:
    """Neighbouring channels are pairs."""
    return _text(tf.CohereForCausalLM, tf.CohereConfig(**TEXT))


def cohere2() -> Built:
    """Neighbouring channels are pairs, and full layers turn nothing."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return _text(tf.Cohere2ForCausalLM, tf.Cohere2Config(**TEXT, sliding_window=12, layer_types=kinds))


def smollm3() -> Built:
    """The second layer turns nothing."""
    return _text(tf.SmolLM3ForCausalLM, tf.SmolLM3Config(**TEXT, no_rope_layer_interval=2))


def glm() -> Built:
    """Half of each head is turned, in neighbouring pairs."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return _text(tf.GlmForCausalLM, tf.GlmConfig(**TEXT, head_dim=8, rope_parameters=rope))


def exaone4() -> Built:
    """Full layers turn nothing; keys are normalised before they are turned."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return _text(tf.Exaone4ForCausalLM, tf.Exaone4Config(**TEXT, sliding_window=12, layer_types=kinds))


VISION: dict[str, Callable[[], Built]] = {
    f.__name__: f
    for f in (
        qwen2_vl, qwen2_5_vl, qwen3_vl, llava, llava_onevision, smolvlm, idefics3, internvl, gemma3,
    )
}  # fmt: skip
WORDS: dict[str, Callable[[], Built]] = {
    f.__name__: f for f in (qwen2, llama, mistral, phi3, gpt_neox, gemma2, gpt_oss)
}
FAMILIES = {**VISION, **WORDS}
ROTATIONS: dict[str, Callable[[], Built]] = {f.__name__: f for f in (cohere, cohere2, smollm3, glm, exaone4)}
"""Families that are of interest for how they turn their keys."""


def build(family: str) -> Built:
    """The model in float32 and its prompt; weights large enough that attention is far from even."""
    torch.manual_seed(3)
    model, inputs = {**FAMILIES, **ROTATIONS}[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
            elif name.endswith("sinks"):
                parameter.normal_()
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = 0
    return model.eval(), inputs
