"""Small caches made of random numbers, for tests that need no model."""

from __future__ import annotations

import numpy as np
import torch

from kvferry.cache import KVCache, LayerCache, Modality, PromptLayout, Role


def layout(text_before: int = 3, rows: int = 4, columns: int = 5, question: int = 6, tail: int = 3) -> PromptLayout:
    """A prompt with one picture of ``rows`` x ``columns`` merged tokens and M-RoPE positions."""
    visual = rows * columns
    n = text_before + visual + question + tail
    modality = np.full(n, Modality.TEXT, np.uint8)
    modality[text_before : text_before + visual] = Modality.IMAGE
    role = np.full(n, Role.SPECIAL, np.uint8)
    role[text_before : text_before + visual] = Role.CONTEXT
    role[text_before + visual : n - tail] = Role.QUESTION
    positions = np.empty((3, n), np.int32)
    positions[:, :text_before] = np.arange(text_before)
    grid = np.indices((1, rows, columns)).reshape(3, -1)
    positions[:, text_before : text_before + visual] = grid + text_before
    start = text_before + max(rows, columns, 1)
    positions[:, text_before + visual :] = start + np.arange(question + tail)
    return PromptLayout(
        token_ids=np.arange(10, 10 + n, dtype=np.int32) * (modality == 0) + 7 * (modality == 1),
        modality=modality,
        role=role,
        positions=positions,
        rope_delta=int(positions[0, -1]) + 1 - n,
        grids=((1, rows, columns),) if visual else (),
    )


def cache(
    prompt: PromptLayout | None = None,
    layers: int = 3,
    heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> KVCache:
    """A full random cache over ``prompt``: keys and values ``[heads, n - 1, dim]``."""
    prompt = prompt or layout()
    length = len(prompt) - 1
    generator = torch.Generator().manual_seed(seed)
    return KVCache(
        tuple(
            LayerCache(
                torch.randn(heads, length, dim, generator=generator).to(dtype),
                torch.randn(heads, length, dim, generator=generator).to(dtype),
                torch.arange(length).expand(heads, -1).contiguous(),
            )
            for _ in range(layers)
        ),
        prompt,
        length,
        fingerprint="ab" * 32,
        model_name="random",
    )
