"""How much an error in a cached key or value moves what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers.cache_utils import Cache

from kvferry.cache import KVCache, LayerCache
from kvferry.models.attention import Session, attached, session
from kvferry.models.resume import kept_layers, positions_after
from kvferry.models.vlm import VLM


def logit_gradients(
    vlm: VLM, cache: KVCache, answer: Sequence[int], probes: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of random sums of logits with respect to every cached key and value.

    Each probe draws ``z ~ N(0, 1)`` and differentiates ``sum(z * (logits - mean logit)) / sqrt(positions)``, so that
    the mean of ``g g^T`` over probes is the Gauss-Newton matrix ``J^T J`` of the answer's centred logits: an error
    ``e`` moves them by ``e^T J^T J e``, to first order. The logits, not their probabilities, because a sure answer has
    hardly a gradient in those.

    Parameters
    ----------
    cache : KVCache
        Of a prompt with its question, whose heads keep equally many tokens.
    answer : sequence of int
        Token ids that are fed after the prompt.

    Returns
    -------
    keys, values : float32 ``[probes, layers, kv_heads, kept, head_dim]``
        With respect to the keys as they are in the cache, rotated.
    """
    leaves = [tuple(part.detach().float().requires_grad_() for part in (x.keys, x.values)) for x in cache]
    layers = tuple(LayerCache(k, v, x.positions) for (k, v), x in zip(leaves, cache, strict=True))
    kept = kept_layers(vlm.model, [replace(cache, layers=layers)], cache.length)
    feed = [*cache.pending.tolist(), *answer]
    device = vlm.model.device
    positions = positions_after(cache.layout, cache.length, len(feed)).to(device)
    with attached(vlm.model), torch.enable_grad(), session(Session(kept=kept)):
        logits = vlm.model(
            input_ids=torch.tensor([feed], device=device),
            position_ids=positions[0][None] if len(positions) == 1 else positions[:, None],
            past_key_values=Cache(layers=kept),
            use_cache=True,
            logits_to_keep=len(answer) + 1,
        ).logits[0]
        centred = logits.float() - logits.float().mean(-1, keepdim=True)
        flat = [x for pair in leaves for x in pair]
        found = []
        for _ in range(probes):
            z = torch.randn(centred.shape, generator=generator).to(device)
            found.append(torch.autograd.grad((z * centred).sum() / len(centred) ** 0.5, flat, retain_graph=True))
    keys = torch.stack([torch.stack(g[0::2]) for g in found])
    values = torch.stack([torch.stack(g[1::2]) for g in found])
    return keys.float(), values.float()
