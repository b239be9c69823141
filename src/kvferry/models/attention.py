"""An attention function for Transformers that watches a few query rows and serves pruned caches.

The output comes from Transformers' own SDPA, or from :func:`kvferry.models.blockwise.attend` where SDPA has no form
for it: soft-capped logits, sink logits, tokens dropped while the cache is built. While prompts are read, an
:class:`Observer` for each notes down what a recipe asks for, from the same post-rotary queries and keys, in blocks of
rows: never an ``n x n`` matrix. While a pruned cache is resumed, the mask is built from the stored positions.

What is going on in the current thread is held in a context variable, so that threads do not mix; ``torch.compile``
must not freeze it, and leaves this function out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvferry.cache import PromptLayout, Role
from kvferry.errors import EvidenceError
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.models.blockwise import Rule, attend, column_sums, densities, density
from kvferry.models.queries import coming_queries
from kvferry.models.rotary import forget_lengths
from kvferry.models.steady import attend as steady_attention
from kvferry.models.steady import is_steady
from kvferry.models.support import text_config, text_config_key
from kvferry.rope import Rotary

NAME = "kvferry"


def rows_of(request: EvidenceRequest, layout: PromptLayout) -> npt.NDArray[np.bool_]:
    """Query rows that a request looks at, ``[n]``.

    ``post_vision`` in a prompt without pictures means what follows the context, or everything where there is none.
    """
    rows = np.zeros(len(layout), dtype=bool)
    if request.rows == "question":
        rows |= layout.question
    elif request.rows == "window":
        rows[max(0, len(layout) - request.window) :] = request.window > 0
    elif request.rows == "visual":
        rows |= layout.visual
    elif request.rows == "post_vision":
        before = layout.visual if layout.visual.any() else layout.role == Role.CONTEXT
        seen = np.flatnonzero(before)
        rows[seen[-1] + 1 if len(seen) else 0 :] = True
    else:
        rows[:] = True
    if not rows.any():
        missing = "show a picture" if request.rows == "visual" else "ask a question, pass proxy_question=..."
        raise EvidenceError(
            f"the prompt has no {request.rows!r} rows to observe; {missing}, or use a selection that needs none, such "
            "as knorm"
        )
    return rows


@dataclass(frozen=True)
class _Plan:
    """The distinct rows that a set of requests needs, and who counts which."""

    requests: tuple[EvidenceRequest, ...]
    rows: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, requests: Sequence[EvidenceRequest], layout: PromptLayout) -> _Plan:
        wanted = np.zeros((len(requests), len(layout)), dtype=np.float32)
        for index, request in enumerate(requests):
            wanted[index] = rows_of(request, layout)
        rows = np.flatnonzero(wanted.any(axis=0))
        return cls(tuple(requests), torch.from_numpy(rows), torch.from_numpy(wanted[:, rows]))

    def part(self, first: int, count: int) -> _Plan:
        """The rows ``first`` to ``first + count``, numbered from 0."""
        mine = (self.rows >= first) & (self.rows < first + count)
        return replace(self, rows=self.rows[mine] - first, weights=self.weights[:, mine])


class Observer:
    """Collects the evidence of one prompt while the model reads it.

    Parameters
    ----------
    requests : sequence of EvidenceRequest
    layout : PromptLayout
    layers : int
        Of the model.
    rotary : sequence of Rotary or None
        One per layer; only ``queries`` need it.

    Raises
    ------
    EvidenceError
        A request has no rows in this prompt, or wants the queries of a layer without a fixed rotation.
    """

    def __init__(
        self,
        requests: Sequence[EvidenceRequest],
        layout: PromptLayout,
        layers: int,
        rotary: Sequence[Rotary | None] = (),
    ) -> None:
        self.layout, self._last, self._rotary = layout, layers - 1, rotary
        self._turns = {layer: turn for layer, turn in enumerate(rotary) if turn is not None}
        self._seen: dict[EvidenceRequest, dict[int, torch.Tensor]] = {x: {} for x in requests}
        self._queries: dict[int, list[torch.Tensor]] = {}
        self._read: dict[int, int] = {}
        self._plans = {
            (statistic, at_the_end): _Plan.of(self._wanted(statistic, at_the_end), layout)
            for statistic in ("sum", "density", "queries")
            for at_the_end in (False, True)
        }
        for layer in range(layers):
            if layer not in self._turns and self._plans["queries", layer == self._last].requests:
                raise EvidenceError(
                    f"layer {layer} does not turn its keys by a fixed rotation, so coming queries cannot be foreseen; "
                    "choose another selection than expected_attention"
                )

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, rule: Rule, first: int = 0) -> None:
        """Look at one layer in one pass over the prompt, or in one of several that follow each other.

        Parameters
        ----------
        query : ``[query_heads, q, d]``, post-rotary
            Of the tokens from ``first`` on.
        key : ``[kv_heads, first + q, d]``, post-rotary
            Of all tokens so far.
        """
        at_the_end, count, n = layer == self._last, query.shape[1], len(self.layout)
        if first < self._read.get(layer, 0):  # a layer that attends twice with the same queries and keys (DiffLlama)
            return
        self._read[layer] = first + count
        plan = self._plans["sum", at_the_end].part(first, count)
        if plan.requests and len(plan.rows):
            sums = column_sums(query, key, plan.rows, plan.weights, rule)
            self._add(layer, plan.requests, pad(sums, (0, n - key.shape[1])))
        plan = self._plans["density", at_the_end].part(first, count)
        if plan.requests and len(plan.rows):
            thresholds = [x.threshold for x in plan.requests]
            self._add(layer, plan.requests, densities(query, key, plan.rows, plan.weights, thresholds, rule))
        whole = self._plans["queries", at_the_end]
        if whole.requests:
            self._queries.setdefault(layer, []).append(query[:, whole.part(first, count).rows.to(query.device)])
            if first + count == n:
                self._foresee(layer, whole, rule.scaling)

    def branch(self, layout: PromptLayout, requests: Sequence[EvidenceRequest]) -> Observer:
        """An observer of another prompt that begins with the tokens read so far, some ``requests`` of this one's.

        Raises
        ------
        EvidenceError
            A row that was read counts otherwise in that prompt, such as one of its last ``window`` tokens.
        """
        other = Observer(requests, layout, self._last + 1, self._rotary)
        read = max(self._read.values(), default=0)
        for request in requests:
            if not np.array_equal(rows_of(request, layout)[:read], rows_of(request, self.layout)[:read]):
                raise EvidenceError(f"the {request.rows!r} rows reach into the {read} tokens that prompts share")
            for layer, seen in self._seen[request].items():
                grow = len(layout) - len(self.layout) if request.statistic == "sum" else 0
                other._seen[request][layer] = pad(seen, (0, grow)) if grow else seen
        other._read = dict(self._read)
        if other._plans["queries", True].requests:
            other._queries = {layer: list(parts) for layer, parts in self._queries.items()}
        return other

    def evidence(self, length: int) -> Evidence:
        """What was seen; columns are cut to the first ``length``."""
        return Evidence(
            {
                request: {layer: self._figures(request, x, length) for layer, x in by_layer.items()}
                for request, by_layer in self._seen.items()
            }
        )

    def _wanted(self, statistic: str, at_the_end: bool) -> list[EvidenceRequest]:
        return [x for x in self._seen if x.statistic == statistic and (at_the_end or x.layers == "all")]

    def _add(self, layer: int, requests: Sequence[EvidenceRequest], seen: torch.Tensor) -> None:
        for request, figures in zip(requests, seen, strict=True):
            before = self._seen[request].get(layer)
            self._seen[request][layer] = figures if before is None else before + figures

    def _foresee(self, layer: int, plan: _Plan, scaling: float) -> None:
        query = torch.cat(self._queries.pop(layer), dim=1)
        for request, counts in zip(plan.requests, plan.weights > 0, strict=True):
            some = query[:, counts.to(query.device)]
            future = coming_queries(some, plan.rows[counts], self.layout, self._turns[layer], request.horizon, scaling)
            self._seen[request][layer] = future

    @staticmethod
    def _figures(request: EvidenceRequest, seen: torch.Tensor, length: int) -> torch.Tensor:
        if request.statistic == "sum":
            return seen[:, :length].clone()
        return density(seen) if request.statistic == "density" else seen


class Kept(Protocol):
    """A cache layer that knows where its tokens stood."""

    def mask(self, query_length: int, query_heads: int, seen: torch.Tensor | None) -> torch.Tensor | None: ...

    def note(self, query: torch.Tensor, rule: Rule, most: int) -> None: ...


@dataclass
class Session:
    """What the attention function does in this thread: watch prompts, drop tokens meanwhile, or serve kept layers.

    ``observers`` are one per sequence of the batch, whose prompts stand behind their padding. ``seen`` (bool
    ``[b, length]``) is false where a token of the sequences so far is padding. ``dropped`` has per layer a bool
    ``[kv_heads, n]``: keys that no token but their own may see. ``outputs``, where it is a list, gets the output of
    every layer's attention, ``[b, tokens, query_heads, d]``. Where prompts are read in several passes, ``total`` is
    how many tokens they have with their padding. Kept layers note the newest ``tail`` queries.
    """

    observers: Sequence[Observer] = ()
    total: int | None = None
    kept: Sequence[Kept] | None = None
    seen: torch.Tensor | None = None
    dropped: Sequence[torch.Tensor] | None = None
    outputs: list[torch.Tensor] | None = None
    tail: int = 0


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):  # a vision tower that shares the language model's configuration
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0], None
    now = _session.get() or Session()
    if now.kept is not None:
        attention_mask = now.kept[layer].mask(query.shape[2], query.shape[1], now.seen)
    is_causal = kwargs.get("is_causal")
    rule = Rule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=query.shape[2] > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        softcap=softcap,
        sinks=s_aux,
        dropped=None if now.dropped is None else now.dropped[layer].to(key.device),
    )
    if now.kept is not None and now.tail:
        now.kept[layer].note(query, replace(rule, causal=False), now.tail)
    masks = [None] * len(query) if attention_mask is None else attention_mask.expand(len(query), -1, -1, -1)
    total, past = now.total or key.shape[2], key.shape[2] - query.shape[2]
    for observer, q, k, mask in zip(now.observers, query, key, masks, strict=False):
        start = total - len(observer.layout)
        real = slice(max(0, start - past), None)
        if q[:, real].shape[1]:
            own = None if mask is None else mask[:, real, start:]
            observer.observe(layer, q[:, real], k[:, start:], replace(rule, mask=own), max(0, past - start))
    output: torch.Tensor
    if rule.dropped is None and is_steady(module):
        output = steady_attention(
            query, key, value, attention_mask, rule.scaling, causal=rule.causal, softcap=softcap, sinks=s_aux
        )
    elif rule.softcap is None and rule.sinks is None and rule.dropped is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    else:
        rules = [replace(rule, mask=mask) for mask in masks]
        each = [attend(q, k, v, own) for q, k, v, own in zip(query, key, value, rules, strict=True)]
        output = torch.stack(each).transpose(1, 2).contiguous()
    if now.outputs is not None:
        now.outputs.append(output)
    return output, None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """SDPA's own mask, except for kept layers, whose masks come from their positions."""
    now = _session.get()
    if now is not None and now.kept is not None:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(NAME, torch.compiler.disable(_attend))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, torch.compiler.disable(_mask))  # type: ignore[no-untyped-call]

_lock = threading.Lock()
_users: WeakKeyDictionary[PreTrainedModel, tuple[int, Callable[[], None]]] = WeakKeyDictionary()


def attach(model: PreTrainedModel) -> None:
    """Use this attention function in the language model (a vision tower keeps its own).

    Meanwhile no prompt changes how the next one is turned, see :func:`kvferry.models.rotary.forget_lengths`.
    """
    with _lock:
        users, undo = _users.get(model) or (0, _take_over(model))
        _users[model] = (users + 1, undo)


def detach(model: PreTrainedModel) -> None:
    """Undo one :func:`attach`; the last one restores what was there before."""
    with _lock:
        users, undo = _users.pop(model)
        if users > 1:
            _users[model] = (users - 1, undo)
        else:
            undo()


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """:func:`attach` for a while."""
    attach(model)
    try:
        yield
    finally:
        detach(model)


def _take_over(model: PreTrainedModel) -> Callable[[], None]:
    before, where = text_config(model)._attn_implementation, ref(model)
    set_implementation(model, NAME)
    remember = forget_lengths(model)

    def undo() -> None:
        remember()
        if (same := where()) is not None:
            set_implementation(same, before)

    return undo


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Choose the language model's attention function."""
    key = text_config_key(model)
    model.set_attn_implementation(name if key is None else {key: name})
