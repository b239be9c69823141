"""A family's own eager attention, with tokens hidden from it and its weights noted down."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from kvferry.models.attention import set_implementation
from kvferry.models.support import text_config

NAME = "kvferry_reference"


@dataclass
class Reference:
    """What the reference hides, and what it saw.

    ``hidden`` has per layer a bool ``[kv_heads, rows, columns]``; ``weights`` gets each layer's attention, float32
    ``[query_heads, rows, columns]``.
    """

    hidden: Sequence[torch.Tensor] = ()
    weights: dict[int, torch.Tensor] = field(default_factory=dict)


_now: ContextVar[Reference | None] = ContextVar("kvferry_reference", default=None)


@contextmanager
def reference(model: PreTrainedModel, hidden: Sequence[torch.Tensor] = ()) -> Iterator[Reference]:
    """Let the language model of ``model`` compute attention by its family's own eager function for a while."""
    before = text_config(model)._attn_implementation
    set_implementation(model, NAME)
    token = _now.set(Reference(hidden))
    try:
        yield _now.get()  # type: ignore[misc]
    finally:
        _now.reset(token)
        set_implementation(model, before)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    now, layer = _now.get(), getattr(module, "layer_idx", None)
    if now is None or layer is None:
        return eager(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if now.hidden:
        hidden = now.hidden[layer].repeat_interleave(query.shape[1] // len(now.hidden[layer]), 0)
        lowest = torch.finfo(query.dtype).min
        nothing = query.new_zeros(1, 1, *hidden.shape[1:])
        attention_mask = (nothing if attention_mask is None else attention_mask).masked_fill(hidden, lowest)
    output, weights = eager(module, query, key, value, attention_mask, **kwargs)
    if weights is not None:
        now.weights[layer] = weights[0, :, :, : key.shape[2]].float()
    return output, weights


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)
