"""What a model is made of, and whether it can be served correctly."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from kvferry.cache import Modality
from kvferry.errors import UnsupportedModelError

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_CROSS = "its text attends to pictures through cross-attention, which is not in the KV cache"
_REFUSED = {
    "mllama": _CROSS,
    "idefics": _CROSS,
    "paligemma": "its whole prompt attends in both directions, so the last token cannot be fed again",
    "deepseek_v2": "multi-head latent attention has its own compressed cache",
    "deepseek_v3": "multi-head latent attention has its own compressed cache",
}


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


def kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Key-value heads and channels per head of every layer."""
    config = text_config(model)
    if getattr(config, "is_heterogeneous", False):
        return [_kv_shape(own) for own in config.per_layer_config]
    return [_kv_shape(config)] * int(config.num_hidden_layers)


def kv_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Key-value heads and channels per head, where all layers have the same.

    Raises
    ------
    UnsupportedModelError
        They have not.
    """
    first, *others = set(kv_shapes(model))
    if others:
        raise UnsupportedModelError(f"the layers of a {model.config.model_type} model differ in heads and channels")
    return first


def _kv_shape(config: Any) -> tuple[int, int]:
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
    """Refuse what would be wrong: by a reason that is known, or by what a check of the family found.

    The check (:mod:`kvferry.models.check`) takes a second or two the first time that a machine meets a configuration.

    Raises
    ------
    UnsupportedModelError
        With the reason, in one sentence.
    """
    from kvferry.models.check import small_models, verdict_of

    if model not in small_models:
        _refuse(model.config, why_not(type(model), model.config) or verdict_of(model).reason)


def check_kind(kind: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """:func:`check_supported` before there are weights."""
    from kvferry.models.check import verdict_on

    _refuse(config, why_not(kind, config) or verdict_on(kind, config).reason)


def _refuse(config: PreTrainedConfig, reason: str) -> None:
    if reason:
        raise UnsupportedModelError(f"{config.model_type} models cannot be served: {reason}")


def tied_heads(model: PreTrainedModel) -> bool:
    """Whether all heads of a layer must keep the same tokens, since the model mixes their keys or values."""
    from kvferry.models.check import small_models, verdict_of

    return model not in small_models and verdict_of(model).tied_heads


def why_not(kind: type[PreTrainedModel], whole: PreTrainedConfig) -> str:
    """The reason why models of a class and a configuration cannot be served, where one is known without trying."""
    if not kind.can_generate():
        return (
            f"a {kind.__name__} does not generate text; pass the whole model with its language head, such as "
            "AutoModelForCausalLM or AutoModelForImageTextToText load"
        )
    if getattr(whole, "is_encoder_decoder", False):
        return "an encoder-decoder keeps cross-attention states beside its KV cache"
    try:
        config = whole.get_text_config(decoder=True)
    except ValueError:  # several candidates
        return "its configuration does not say which part is the language model; pass the inner model"
    known = _REFUSED.get(whole.model_type) or _REFUSED.get(config.model_type)
    if known:
        return known
    if getattr(kind, "_is_stateful", False):
        return "recurrent (state-space) layers keep a state that has no tokens to select"
    if field(config, "kv_lora_rank"):
        return "multi-head latent attention has its own compressed cache"
    if field(config, "num_kv_shared_layers"):
        return "layers that share one cache are not told apart yet"
    if field(config, "use_bidirectional_attention") or field(config, "is_causal") is False:
        return "its text attends in both directions"
    other = set(field(config, "layer_types") or ()) - _KNOWN_LAYERS
    if other or field(config, "attention_chunk_size"):
        return f"layers of type {', '.join(sorted(other)) or 'chunked_attention'} do not keep an ordinary KV cache"
    return ""


def field(config: Any, name: str) -> Any:
    """A field of a configuration; None where it has none, or none that all layers share."""
    try:
        return getattr(config, name, None)
    except Exception:  # Transformers' own kinds of error, by version
        return None


def explanation(kind: type[PreTrainedModel], whole: PreTrainedConfig) -> str:
    """What is most likely to blame where a check fails; empty where nothing is known."""
    if not getattr(kind, "_supports_attention_backend", False):
        return "its code does not go through Transformers' AttentionInterface"
    if getattr(whole.get_text_config(decoder=True), "is_decoder", True) is False:
        return "its text attends in both directions"
    return ""
