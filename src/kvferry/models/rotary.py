"""How a loaded model rotates its keys, layer by layer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from kvferry.models.support import text_config
from kvferry.rope import Rotary

_MOVING = {"dynamic", "longrope"}
"""Kinds of RoPE whose frequencies depend on the length of the prompt."""


def rotary_of(model: PreTrainedModel) -> tuple[Rotary | None, ...]:
    """One :class:`kvferry.rope.Rotary` per layer; None where keys are not turned by a fixed rotation."""
    config = text_config(model)
    count = int(config.num_hidden_layers)
    module = _rotary_module(model)
    if module is None:
        return (None,) * count
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    if hasattr(module, "inv_freq"):
        return (_rotary(module, "", config.rope_parameters),) * count
    by_kind = {kind: _rotary(module, f"{kind}_", config.rope_parameters[kind]) for kind in set(kinds)}
    return tuple(by_kind[kind] for kind in kinds)


def _rotary_module(model: PreTrainedModel) -> Any:
    decoder = model.get_decoder()
    return getattr(decoder, "rotary_emb", None)


def _rotary(module: Any, prefix: str, parameters: dict[str, Any]) -> Rotary | None:
    inv_freq = getattr(module, f"{prefix}inv_freq", None)
    if inv_freq is None or parameters.get("rope_type", "default") in _MOVING:
        return None
    sections = getattr(module, "mrope_section", None) or ()
    return Rotary(
        inv_freq.detach().float().cpu(),
        float(getattr(module, f"{prefix}attention_scaling", 1.0)),
        tuple(int(x) for x in sections),
        interleaved="Qwen3" in type(module).__name__,
    )
