"""Attention for training on a CPU: plain matrix products, which bfloat16 units like, and a place to watch from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "kvferry_testbed_training"

Watch = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> (batch index, query index) of the rows whose attention is to be kept, each `[rows]`."""


class Watcher:
    """Keeps the attention of chosen rows while a forward pass runs; used to guide training."""

    def __init__(self) -> None:
        self.rows: Watch = {}
        self.seen: dict[int, torch.Tensor] = {}

    def look(self, rows: Watch) -> None:
        """Choose the rows of the next forward pass and forget the last ones."""
        self.rows, self.seen = rows, {}


WATCHER = Watcher()


def training_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention, `[batch, heads, length, channels]` in, `[batch, length, heads, channels]` out."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask.to(dtype)
    with torch.autocast("cpu", enabled=False):
        weights = torch.softmax(scores, dim=-1)
    layer = getattr(module, "layer_idx", None)
    if layer in WATCHER.rows:
        batch, row = WATCHER.rows[layer]
        WATCHER.seen[layer] = weights[batch, :, row].float()
    return (weights @ value).transpose(1, 2), None


def use_training_attention(model: Any) -> None:
    """Switch a model's tower and language model to `training_attention`."""
    AttentionInterface.register(NAME, training_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
