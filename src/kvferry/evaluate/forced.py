"""Whether a model says the true answer on top of a cache: in one pass for many caches of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from kvferry.cache import KVCache
    from kvferry.models import VLM

BATCH = 16
"""Caches of similar size that are judged in one forward pass."""


def forced_logits(
    vlm: VLM,
    caches: Mapping[str, KVCache],
    truth: str,
    question: str | None = None,
    outputs: dict[str, list[torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """Logits for ``truth`` as an answer and for what follows it, float32 ``[tokens + 1, vocabulary]`` for each cache.

    Parameters
    ----------
    caches : mapping of str to KVCache
        All of one prompt.
    question : str, optional
        Under protocol B, see :meth:`kvferry.models.VLM.score_many`.
    outputs : dict, optional
        Gets for each cache every layer's attention output, ``[tokens fed, query_heads, d]``.
    """
    wanted = _token_ids(vlm, truth)
    logits: dict[str, torch.Tensor] = {}
    by_size = sorted(caches, key=lambda row: caches[row].nbytes)
    for batch in (by_size[i : i + BATCH] for i in range(0, len(by_size), BATCH)):
        layers: list[torch.Tensor] = []
        scores = vlm.score_many([caches[row] for row in batch], wanted, question, outputs=layers)
        logits.update(zip(batch, scores, strict=True))
        if outputs is not None:
            outputs.update((row, [layer[i] for layer in layers]) for i, row in enumerate(batch))
    return logits


def says(vlm: VLM, logits: torch.Tensor, truth: str) -> bool:
    """Whether every token of ``truth``, and the end after it, is the most likely one in :func:`forced_logits`."""
    from kvferry.models.resume import stop_ids

    best = logits.argmax(-1).tolist()
    return best[:-1] == _token_ids(vlm, truth) and best[-1] in stop_ids(vlm.model)


def _token_ids(vlm: VLM, text: str) -> list[int]:
    found: list[int] = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
