"""Attention among packed questions, block by block: a question sees the prefix and itself, so most of the square of all
against all is never computed. For training on a CPU, where that square is a fifth of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "kvferry_testbed_blocks"


@dataclass(frozen=True)
class Blocks:
    """Spans of rows of one packed sequence, and what each may see: the prefix and its own span.

    Attributes
    ----------
    prefix : int
        Tokens that everybody after them sees.
    spans : tuple of (int, int)
        Rows from, to; the first span is the prefix itself, and no question is in two.
    masks : tuple of torch.Tensor
        Additive float32, ``[rows of the span, prefix + rows of the span]``; the prefix's is square.
    """

    prefix: int
    spans: tuple[tuple[int, int], ...]
    masks: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, segments: Sequence[int], rows: int = 128) -> Blocks:
        """For a sequence's segments (0 is the prefix, 1.. the questions in order), about so many rows a span."""
        segment = np.asarray(segments)
        prefix = int((segment == 0).sum())
        ends = [*(np.flatnonzero(np.diff(segment[prefix:])) + prefix + 1).tolist(), len(segment)]
        spans, start, last = [(0, prefix)], prefix, prefix
        for end in ends:
            if end - start > rows and last > start:
                spans.append((start, last))
                start = last
            last = end
        if last > start:
            spans.append((start, last))
        return cls(prefix, tuple(spans), tuple(_mask(segment, prefix, *span) for span in spans))


def _mask(segment: Any, prefix: int, start: int, end: int) -> torch.Tensor:
    rows = np.arange(start, end)
    columns = np.concatenate([np.arange(prefix if start else 0), rows])
    seen = (segment[columns][None] == 0) | (segment[columns][None] == segment[rows][:, None])
    allowed = (columns[None] <= rows[:, None]) & seen
    return torch.from_numpy(np.where(allowed, 0.0, -1e9).astype(np.float32))


def block_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: tuple[Blocks, ...] | None, scaling: float, **_others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Softmax attention, ``[batch, heads, length, channels]`` in, ``[batch, length, heads, channels]`` out.

    ``attention_mask`` holds the blocks of each sequence; without it attention is causal. Query heads that share a key
    head are attended as further rows of it.
    """
    groups = query.shape[1] // key.shape[1]
    if attention_mask is None:
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        seen = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
        return seen.transpose(1, 2), None
    each = [
        _one(query[i] * scaling, key[i], value[i], blocks) for i, blocks in enumerate(attention_mask)
    ]  # fmt: skip
    return torch.stack(each).transpose(1, 2), None


def _one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    heads, length, width = query.shape
    query = query.view(len(key), heads // len(key), length, width)
    before = blocks.prefix
    found = []
    for (start, end), mask in zip(blocks.spans, blocks.masks, strict=True):
        keys, values = key[:, start:end], value[:, start:end]
        if start:
            keys, values = torch.cat([key[:, :before], keys], 1), torch.cat([value[:, :before], values], 1)
        scores = query[:, :, start:end].reshape(len(key), -1, width) @ keys.transpose(1, 2)
        weights = (scores.view(len(key), -1, *mask.shape) + mask).softmax(-1).view(scores.shape)
        found.append((weights @ values).view(*query.shape[:2], end - start, width))
    tail = length - blocks.spans[-1][1]
    if tail:
        found.append(query.new_zeros(*query.shape[:2], tail, width))
    return torch.cat(found, 2).reshape(heads, length, width)


def use_blocks(words: Any) -> None:
    """Switch a language model to `block_attention`; its mask is then ``{"full_attention": blocks}`` or nothing."""
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, lambda *_args, **_options: None)
    words.config._attn_implementation = NAME
