"""How a loaded model rotates its keys, layer by layer, and where that depends on how long a prompt is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from kvferry.errors import UnsupportedModelError
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


def frequencies_at(model: PreTrainedModel, reach: int) -> tuple[Any, ...]:
    """Stands for the frequencies by which a pass turns its keys whose last position is ``reach - 1``.

    Equal values mean equal frequencies. They depend on ``reach`` for dynamic NTK scaling, which stretches them with
    every token beyond the model's own length, and for LongRoPE, which has a second set of them for long prompts.
    """
    return tuple(max(reach, limit) if kind == "dynamic" else reach > limit for kind, limit in _moving_rotations(model))


def moves(model: PreTrainedModel) -> bool:
    """Whether the frequencies of a pass depend on how far it reaches, for all of its sequences together."""
    return bool(_moving_rotations(model))


def check_same_turn(model: PreTrainedModel, before: int, after: int) -> None:
    """A cache that reaches ``before`` must not go on to ``after`` where LongRoPE changes to its other frequencies.

    Dynamic NTK scaling may go on: there every step turns its keys by other frequencies, in Transformers too.

    Raises
    ------
    UnsupportedModelError
        It would; the keys of the cache and those to come would not fit each other.
    """
    for kind, limit in _moving_rotations(model):
        if kind == "longrope" and before <= limit < after:
            raise UnsupportedModelError(
                f"beyond {limit:,} tokens {model.config.model_type} turns all keys by other frequencies (LongRoPE), so "
                f"a compressed cache of {before:,} tokens cannot go on there; ask for fewer new tokens, or shorten the "
                "prompt"
            )


def _moving_rotations(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Kinds of RoPE in :data:`_MOVING` that a model has, each with the length from which on it changes."""
    config = text_config(model)
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given] if "rope_type" in given else [x for x in given.values() if isinstance(x, dict)]
    return [
        (kind, int(config.max_position_embeddings if kind == "dynamic" else x["original_max_position_embeddings"]))
        for x in kinds
        if (kind := x.get("rope_type")) in _MOVING
    ]


def forget_lengths(model: PreTrainedModel) -> Callable[[], None]:
    """Let every pass turn its keys by its own length alone, until the returned function is called.

    Transformers' modules of :data:`_MOVING` kinds remember the longest prompt so far, or write the frequencies of
    the pass at hand where another thread reads its own.
    """
    modules = list(_moving_modules(model)) if _moving_rotations(model) else []
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = _alone(module)

    def undo() -> None:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward

    return undo


def _moving_modules(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is not None and set(kinds.values() if isinstance(kinds, dict) else [kinds]) & _MOVING:
            yield module


def _alone(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward pass of a rotary module on a copy that has turned nothing before."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        fresh = copy(module)
        buffers = {
            name: buffer if buffer is None or name.endswith("original_inv_freq") else buffer.clone()
            for name, buffer in module._buffers.items()
        }
        own = {**vars(module), **buffers}
        for name in buffers.keys() | vars(module).keys():
            if name.endswith("original_inv_freq"):
                buffers[name.replace("original_inv_freq", "inv_freq")] = own[name].clone()
            elif name.endswith("max_seq_len_cached"):
                vars(fresh)[name] = vars(module)["original_max_seq_len"]
        vars(fresh)["_buffers"] = buffers
        return type(module).forward(fresh, *args, **kwargs)

    return forward
