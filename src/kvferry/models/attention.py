"""An attention function for Transformers that watches a few query rows and serves pruned caches.

The output comes from Transformers' own SDPA. While a prompt is read, an :class:`Observer` adds up the columns of
softmax attention for the rows that a recipe asks for, from the same post-rotary queries and keys, in blocks of
rows: never an ``n x n`` matrix. While a pruned cache is resumed, the mask is built from the stored positions.

What is going on in the current thread is held in a context variable, so that threads do not mix.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvferry.cache import PromptLayout, Role
from kvferry.errors import EvidenceError
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.models.support import text_config, text_config_key

NAME = "kvferry"
ROWS_PER_BLOCK = 64


def rows_of(request: EvidenceRequest, layout: PromptLayout) -> npt.NDArray[np.bool_]:
    """Query rows that a request sums over, ``[n]``.

    ``post_vision`` in a prompt without pictures means what follows the context, or everything where there is none.
    """
    rows = np.zeros(len(layout), dtype=bool)
    if request.rows == "question":
        rows |= layout.question
    elif request.rows == "window":
        rows[max(0, len(layout) - request.window) :] = request.window > 0
    elif request.rows == "post_vision":
        before = layout.visual if layout.visual.any() else layout.role == Role.CONTEXT
        seen = np.flatnonzero(before)
        rows[seen[-1] + 1 if len(seen) else 0 :] = True
    else:
        rows[:] = True
    if not rows.any():
        raise EvidenceError(
            f"the prompt has no {request.rows!r} rows to observe; ask a question, pass proxy_question=..., or use a "
            "selection that needs none, such as knorm"
        )
    return rows


def column_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Weighted column sums of softmax attention over some query rows.

    Parameters
    ----------
    query : ``[query_heads, n, d]``, post-rotary
    key : ``[kv_heads, n, d]``, post-rotary
    rows : int64 ``[r]``, ascending, on the CPU
        Which queries to look at.
    weights : float32 ``[requests, r]``
        What each row counts in each sum.
    scaling : float
        Multiplies the logits.
    mask : bool or additive float ``[1 or query_heads, n, n]``, optional
    causal : bool
        Whether, without a mask, query ``i`` sees keys up to ``i`` only.

    Returns
    -------
    float32 ``[requests, kv_heads, n]``, the mean over the query heads of each group.
    """
    heads, n, d = key.shape
    group = query.shape[0] // heads
    sums = torch.zeros(heads, len(weights), n, device=key.device)
    keys = key.float().transpose(1, 2)
    for some, share in zip(torch.split(rows, ROWS_PER_BLOCK), torch.split(weights, ROWS_PER_BLOCK, dim=1), strict=True):
        only_past = causal and mask is None
        first, seen = int(some[0]), int(some[-1]) + 1 if only_past else n
        some = some.to(key.device)
        logits = (query[:, some].float() * scaling).reshape(heads, group * len(some), d) @ keys[..., :seen]
        by_row = logits.view(heads, group, len(some), seen)
        if mask is not None:
            _apply_mask(by_row, mask[:, some])
        elif only_past:
            future = torch.arange(first, seen, device=key.device) > some[:, None]
            by_row[..., first:].masked_fill_(future, -torch.inf)
        sums[..., :seen] += (share / group).repeat(1, group) @ logits.softmax(-1)
    return sums.transpose(0, 1)


def _apply_mask(logits: torch.Tensor, mask: torch.Tensor) -> None:
    heads, group, rows, n = logits.shape
    mask = mask.view(heads, group, rows, n) if mask.shape[0] > 1 else mask.unsqueeze(0)
    if mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -torch.inf)
    else:
        logits += mask


@dataclass(frozen=True)
class _Plan:
    """The distinct rows that a set of requests needs, and who counts which."""

    requests: tuple[EvidenceRequest, ...]
    rows: torch.Tensor
    weights: torch.Tensor


class Observer:
    """Collects the evidence of one prompt while the model reads it."""

    def __init__(self, requests: Sequence[EvidenceRequest], layout: PromptLayout, layers: int) -> None:
        self._last = layers - 1
        self._everywhere = _plan([x for x in requests if x.layers == "all"], layout)
        self._at_the_end = _plan(requests, layout)
        self._sums: dict[EvidenceRequest, dict[int, torch.Tensor]] = {x: {} for x in requests}

    def observe(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        causal: bool,
    ) -> None:
        """Look at one layer; ``query`` and ``key`` are ``[1, heads, n, d]``."""
        plan = self._at_the_end if layer == self._last else self._everywhere
        if not plan.requests:
            return
        sums = column_sums(
            query[0],
            key[0],
            plan.rows,
            plan.weights.to(key.device),
            scaling=scaling,
            mask=None if mask is None else mask[0],
            causal=causal,
        )
        for request, columns in zip(plan.requests, sums, strict=True):
            self._sums[request][layer] = columns

    def evidence(self, length: int) -> Evidence:
        """What was seen, cut to the first ``length`` columns."""
        return Evidence(
            {
                request: {layer: columns[:, :length].clone() for layer, columns in by_layer.items()}
                for request, by_layer in self._sums.items()
            }
        )


def _plan(requests: Sequence[EvidenceRequest], layout: PromptLayout) -> _Plan:
    wanted = np.zeros((len(requests), len(layout)), dtype=np.float32)
    for index, request in enumerate(requests):
        wanted[index] = rows_of(request, layout)
    rows = np.flatnonzero(wanted.any(axis=0))
    return _Plan(tuple(requests), torch.from_numpy(rows), torch.from_numpy(wanted[:, rows]))


class Kept(Protocol):
    """A cache layer that knows where its tokens stood."""

    def mask(self, query_length: int, query_heads: int) -> torch.Tensor | None: ...


@dataclass
class Session:
    """What the attention function does in this thread: watch a prompt, or serve kept layers."""

    observer: Observer | None = None
    kept: Sequence[Kept] | None = None


_session: ContextVar[Session | None] = ContextVar("kvferry_session", default=None)


def current_session() -> Session | None:
    """The session of the calling thread."""
    return _session.get()


@contextmanager
def session(value: Session) -> Iterator[Session]:
    """Make ``value`` the session of the calling thread for a while."""
    token = _session.set(value)
    try:
        yield value
    finally:
        _session.reset(token)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    now = _session.get()
    if now is not None and now.kept is not None:
        attention_mask = now.kept[int(module.layer_idx)].mask(query.shape[2], query.shape[1])  # type: ignore[arg-type]
    elif now is not None and now.observer is not None:
        is_causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        now.observer.observe(int(module.layer_idx), query, key, attention_mask, scale, bool(causal))  # type: ignore[arg-type]
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return output


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """SDPA's own mask, except for kept layers, whose masks come from their positions."""
    now = _session.get()
    if now is not None and now.kept is not None:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)

_lock = threading.Lock()
_users: WeakKeyDictionary[PreTrainedModel, tuple[int, str]] = WeakKeyDictionary()


def attach(model: PreTrainedModel) -> None:
    """Use this attention function in the language model (a vision tower keeps its own)."""
    with _lock:
        users, before = _users.get(model, (0, text_config(model)._attn_implementation))
        if not users:
            _set_implementation(model, NAME)
        _users[model] = (users + 1, before)


def detach(model: PreTrainedModel) -> None:
    """Undo one :func:`attach`; the last one restores what was there before."""
    with _lock:
        users, before = _users.pop(model)
        if users > 1:
            _users[model] = (users - 1, before)
        else:
            _set_implementation(model, before)


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """:func:`attach` for a while."""
    attach(model)
    try:
        yield
    finally:
        detach(model)


def _set_implementation(model: PreTrainedModel, name: str) -> None:
    key = text_config_key(model)
    model.set_attn_implementation(name if key is None else {key: name})
