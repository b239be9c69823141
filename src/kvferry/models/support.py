"""What a model is made of, and whether it can be served correctly."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedModel

from kvferry.cache import Modality
from kvferry.errors import UnsupportedModelError

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_REFUSED = {
    "mllama": "its text attends to pictures through cross-attention, which is not in the KV cache",
    "paligemma": "its whole prompt attends in both directions, so the last token cannot be fed again",
    "deepseek_v2": "multi-head latent attention has its own compressed cache",
    "deepseek_v3": "multi-head latent attention has its own compressed cache",
}
_WITHOUT_SDPA = {"gemma2", "gpt_oss"}
"""Families without an SDPA form whose soft cap or sink logits reach our attention function, which serves them."""


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model inside ``model``."""
    return model.config.get_text_config(decoder=True)


def text_config_key(model: PreTrainedModel) -> str | None:
    """Name of the sub-configuration that holds the language model; None where the model is only that."""
    wanted = text_config(model)
    if wanted is model.config:
        return None
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is wanted:
            return str(key)
    raise UnsupportedModelError(
        f"{model.config.model_type} hides its language model more than one level deep; pass the inner model"
    )


def layer_windows(model: PreTrainedModel) -> list[int | None]:
    """Sliding window of every layer in tokens; None for full attention."""
    layers = DynamicCache(config=model.config).layers
    return [x.sliding_window if getattr(x, "is_sliding", False) else None for x in layers]


def kv_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Key-value heads per layer and channels per head."""
    config = text_config(model)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return heads, int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def visual_token_ids(config: Any) -> dict[int, Modality]:
    """Placeholder token ids and what they stand for."""
    found: dict[int, Modality] = {}
    for name, modality in (("image", Modality.IMAGE), ("video", Modality.VIDEO)):
        for suffix in ("_token_id", "_token_index"):
            token = getattr(config, name + suffix, None)
            if token is not None:
                found.setdefault(int(token), modality)
    return found


def check_supported(model: PreTrainedModel) -> None:
    """Refuse by name what would be silently wrong.

    Raises
    ------
    UnsupportedModelError
        With the reason, in one sentence.
    """
    reason = _why_not(model)
    if reason:
        raise UnsupportedModelError(f"{model.config.model_type} models cannot be served: {reason}")


def _why_not(model: PreTrainedModel) -> str | None:
    kind, config = model.config.model_type, text_config(model)
    if kind in _REFUSED or config.model_type in _REFUSED:
        return _REFUSED.get(kind) or _REFUSED[config.model_type]
    if model.config.is_encoder_decoder:
        return "an encoder-decoder keeps cross-attention states beside its KV cache"
    if getattr(model, "_is_stateful", False):
        return "recurrent (state-space) layers keep a state that has no tokens to select"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention has its own compressed cache"
    own = config.model_type in _WITHOUT_SDPA
    if getattr(config, "attn_logit_softcapping", None) and not own:
        return "its attention logits are soft-capped in a way that has not been checked"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers that share one cache are not told apart yet"
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return "its text attends in both directions"
    other = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if other or getattr(config, "attention_chunk_size", None):
        return f"layers of type {', '.join(sorted(other)) or 'chunked_attention'} do not keep an ordinary KV cache"
    if not getattr(model, "_supports_attention_backend", False):
        return "its code does not go through Transformers' AttentionInterface"
    if not getattr(model, "_supports_sdpa", True) and not own:
        return "its attention has no scaled_dot_product_attention form, and its own has not been checked"
    return None
