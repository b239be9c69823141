"""How a loaded model rotates its keys, layer by layer."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from kvferry.models.support import text_config
from kvferry.rope import Rotary

_MOVING = {"dynamic", "longrope"}
"""Kinds of RoPE whose frequencies depend on the length of the prompt."""
_FULL_UNTURNED = {"cohere2", "cohere2_moe", "exaone4", "exaone_moe"}
"""Families that turn the keys of sliding layers only; the others that leave some out say so by ``use_rope``."""
_HALVES = {"gpt_oss"}
"""Families whose code does not show by a ``rotate_half`` that it pairs the two halves of a head."""


def rotary_of(model: PreTrainedModel) -> tuple[Rotary | None, ...]:
    """One :class:`kvferry.rope.Rotary` per layer; None where keys are not turned by a fixed rotation that is known."""
    config = text_config(model)
    count = int(config.num_hidden_layers)
    decoder = model.get_decoder()
    module = getattr(decoder, "rotary_emb", None)
    neighbours = _pairs_neighbours(config.model_type, module)
    if module is None or neighbours is None:
        return (None,) * count
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    if hasattr(module, "inv_freq"):
        by_kind = dict.fromkeys(kinds, _rotary(module, "", config.rope_parameters, neighbours))
    else:
        by_kind = {kind: _rotary(module, f"{kind}_", config.rope_parameters[kind], neighbours) for kind in set(kinds)}
    return tuple(
        Rotary(torch.zeros(0)) if _unturned(config, kind, layer) else by_kind[kind]
        for kind, layer in zip(kinds, decoder.layers, strict=True)
    )


def _pairs_neighbours(family: str, module: Any) -> bool | None:
    """Whether neighbouring channels are turned together, asked of the model's own code; None where it cannot say."""
    rotate_half = getattr(sys.modules[type(module).__module__], "rotate_half", None)
    if rotate_half is None:
        return False if family in _HALVES else None
    turned = rotate_half(torch.arange(4.0)).tolist()
    return {(-2.0, -3.0, 0.0, 1.0): False, (-1.0, 0.0, -3.0, 2.0): True}.get(tuple(turned))


def _unturned(config: Any, kind: str, layer: Any) -> bool:
    """Whether a layer leaves its keys as they are (NoPE)."""
    attention = getattr(layer, "self_attn", None)
    if config.model_type in _FULL_UNTURNED:
        forced = getattr(attention, "force_rope", False)
        return kind == "full_attention" and config.sliding_window is not None and not forced
    return not getattr(attention, "use_rope", True)


def _rotary(module: Any, prefix: str, parameters: dict[str, Any], neighbours: bool) -> Rotary | None:
    inv_freq = getattr(module, f"{prefix}inv_freq", None)
    sections = getattr(module, "mrope_section", None) or ()
    if inv_freq is None or parameters.get("rope_type", "default") in _MOVING or (sections and neighbours):
        return None
    return Rotary(
        inv_freq.detach().float().cpu(),
        float(getattr(module, f"{prefix}attention_scaling", 1.0)),
        tuple(int(x) for x in sections),
        interleaved="Qwen3" in type(module).__name__,
        neighbours=neighbours,
    )
