"""One row per token of a cache, and of what an answer's logits depend on: what calibrations look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvferry.cache import KVCache
from kvferry.codecs import stack
from kvferry.codecs.profile import to_rows
from kvferry.errors import InputError
from kvferry.lazy import torch

if TYPE_CHECKING:
    from kvferry.models import VLM

TOKENS_OF_ANSWER = 16


def rows_of(vlm: VLM, cache: KVCache, name: str) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Keys (un-rotated) and values of every token, ``[k, p]``, and where it stands in the prompt, ``[k]``.

    Raises
    ------
    InputError
        Some are NaN or infinity; says so of the question ``name``.
    """
    keys, values, positions = stack(cache.layers)
    index: npt.NDArray[np.int64] = positions.cpu().numpy()
    rows = to_rows(vlm.rotary, keys.cpu(), values.cpu(), _places(cache, index))
    _check(rows, name)
    return rows, index


def slopes_of(
    vlm: VLM, whole: KVCache, kept: KVCache, index: npt.NDArray[np.int64], probes: int, generator: torch.Generator,
    name: str,
) -> torch.Tensor:  # fmt: skip
    """Gradients of the answer that ``whole`` gives with respect to those rows of ``kept``, ``[probes, k, p]``; see
    :func:`kvferry.models.sensitivity.logit_gradients`. Raises as :func:`rows_of`."""
    from kvferry.models.sensitivity import logit_gradients

    answer = vlm.resume(whole, max_new_tokens=TOKENS_OF_ANSWER).token_ids
    pairs = zip(*logit_gradients(vlm, kept, answer, probes, generator), strict=True)
    where = _places(kept, index)
    slopes = torch.stack([to_rows(vlm.rotary, k.cpu(), v.cpu(), where) for k, v in pairs])
    _check(slopes, name)
    return slopes


def _places(cache: KVCache, index: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(cache.layout.positions[:, index].astype(np.int64))


def _check(rows: torch.Tensor, name: str) -> None:
    if not bool(rows.isfinite().all()):
        raise InputError(
            f"{name}: keys, values or their gradients hold NaN or infinity, most likely because float16 overflowed; "
            "load the model with --dtype bfloat16 or float32"
        )
