"""Visual tokens dropped inside prefill: from a layer on, only those that the question looks at go further."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.evidence import Evidence, EvidenceRequest, Prefilled
from kvferry.models.attention import Session, rows_of, session
from kvferry.models.blockwise import Rule, column_sums
from kvferry.models.support import tied_heads
from kvferry.models.tower_pruning import TowerPruning
from kvferry.selection.base import Selection
from kvferry.selection.eviction import kept_count


@dataclass(frozen=True)
class Pruning:
    """Which visual tokens do not reach the deeper layers.

    FastV (L. Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764): the attention of layer
    ``layer - 1`` ranks the visual tokens, and layers from ``layer`` on compute, and cache, only the best of them and
    all text. Kept tokens keep their positions. The paper looks at what the last token attends to; here the question's
    tokens, as in Q2C, unless ``looks`` says otherwise.

    Parameters
    ----------
    layer : int
        The first layer that sees fewer tokens; at least 1, since some layer must have looked.
    fraction : float
        Of the visual tokens that go further, in (0, 1].
    looks : {"question", "last"}
        Whose attention ranks, the mean over query heads.
    """

    layer: int
    fraction: float
    looks: str = "question"

    def __post_init__(self) -> None:
        if self.layer < 1 or not 0.0 < self.fraction <= 1.0:
            raise InputError(
                f"pruning from layer {self.layer} on to {self.fraction:g} of the visual tokens: the layer is at least "
                "1, and the fraction in (0, 1]"
            )
        if self.looks not in ("question", "last"):
            raise InputError(f"looks={self.looks!r}: visual tokens are ranked by the 'question' or by the 'last' token")

    @property
    def request(self) -> EvidenceRequest:
        """The rows that rank."""
        return EvidenceRequest("question") if self.looks == "question" else EvidenceRequest("window", window=1)


class _Pruner:
    """Watches one prompt until the layer is reached; then narrows what the deeper layers are given."""

    def __init__(self, pruning: Pruning, layout: PromptLayout) -> None:
        self.layout = layout
        self._pruning = pruning
        self._rows = torch.from_numpy(rows_of(pruning.request, layout).nonzero()[0])
        self.kept: torch.Tensor | None = None
        """Tokens that go further, int64 ``[k]``, ascending; known once the layer before was read."""
        self.session: Session | None = None

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, rule: Rule, first: int = 0) -> None:
        """Rank after the last full layer; nothing is watched from there on."""
        if layer != self._pruning.layer - 1 or self.kept is not None:
            return
        (sums,) = column_sums(query, key, self._rows, torch.ones(1, len(self._rows)), rule)
        visual = torch.from_numpy(self.layout.visual).to(sums.device)
        scores = sums.mean(0).masked_fill(~visual, torch.inf)
        count = int((~visual).sum()) + kept_count(self._pruning.fraction, int(visual.sum()))
        self.kept = scores.topk(count).indices.sort().values
        if self.session is not None:
            self.session.observers = ()

    def narrow(self, layer: int, given: dict[str, Any]) -> dict[str, Any]:
        """What a deeper layer gets instead of what it is ``given`` by name.

        Raises
        ------
        UnsupportedModelError
            Something of the prompt's length that is not known to be cut.
        """
        if layer < self._pruning.layer:
            return given
        assert self.kept is not None
        hidden = given.pop("hidden_states")
        if layer == self._pruning.layer:
            hidden = hidden.index_select(1, self.kept.to(hidden.device))
        return {"hidden_states": hidden} | {name: self._cut(name, value) for name, value in given.items()}

    def _cut(self, name: str, value: Any) -> Any:
        n = len(self.layout)
        if isinstance(value, tuple | list):
            return type(value)(self._cut(name, x) for x in value)
        if not isinstance(value, torch.Tensor) or n not in value.shape:
            return value
        assert self.kept is not None
        kept = self.kept.to(value.device)
        if name.startswith("position_embeddings") and value.shape[-2] == n:
            return value.index_select(-2, kept)
        if name == "attention_mask" and value.shape[-2:] == (n, n):
            return value.index_select(-1, kept).index_select(-2, kept)
        if name in ("position_ids", "cache_position") and value.shape[-1] == n:
            return value.index_select(-1, kept)
        raise UnsupportedModelError(f"its layers get {name} {list(value.shape)} for every token, which is not known")


def check_alone(
    prune: Pruning | TowerPruning | None, requests: Sequence[EvidenceRequest], watch: Any, construct: Any, scene: bool
) -> None:
    """Refuse what does not go with pruning inside prefill.

    Raises
    ------
    InputError
        Something else looks at attention or hides tokens, or there is no question yet.
    """
    if prune is None:
        return
    if requests or watch is not None or construct is not None:
        raise InputError(
            "a pruned prefill ranks by itself and cannot be observed or ranked again; leave recipe, requests, watch "
            "and construct out, and compress by full|CODEC"
        )
    if scene and isinstance(prune, Pruning):
        raise InputError(
            "this pruning keeps the visual tokens that the question looks at; pass the question, or prune by the "
            "vision tower: TowerPruning(fraction)"
        )


def read_pruned(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    layout: PromptLayout,
    pruning: Pruning,
    *,
    length: int,
    fingerprint: str,
) -> Prefilled:
    """:func:`kvferry.models.prefill.read_prompt` with fewer visual tokens in the deeper layers.

    The cache holds exactly what each layer computed. It cannot be ranked again; a codec still applies (``full|int4``).

    Raises
    ------
    UnsupportedModelError
        The model has not so many layers, or it was not found right on a small model of its configuration.
    EvidenceError
        There is no question.
    """
    check_prunable(model, pruning)
    return _read(model, inputs, layout, pruning, length=length, fingerprint=fingerprint)


def _read(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    layout: PromptLayout,
    pruning: Pruning,
    *,
    length: int,
    fingerprint: str,
) -> Prefilled:
    from kvferry.models.prefill import model_inputs

    began = time.perf_counter()
    pruner, past = _Pruner(pruning, layout), DynamicCache()
    now = Session(observers=[pruner])  # type: ignore[list-item]
    pruner.session = now
    with torch.inference_mode(), session(now), _narrowing(model, pruner):
        output = model(**model_inputs(model, inputs, layout), past_key_values=past, use_cache=True, logits_to_keep=1)
    assert pruner.kept is not None
    every = torch.arange(len(layout), device=pruner.kept.device)
    held = [every if i < pruning.layer else pruner.kept for i in range(len(past.layers))]
    layers = [_layer(layer, positions[positions < length]) for layer, positions in zip(past.layers, held, strict=True)]
    cache = KVCache(
        tuple(layers), layout, length, fingerprint=fingerprint, tied_heads=tied_heads(model),
        model_name=str(getattr(model, "name_or_path", "")),
    )  # fmt: skip
    return Prefilled(cache, Evidence(), output.logits[0, -1].float().clone(), time.perf_counter() - began)


def _layer(layer: Any, positions: torch.Tensor) -> LayerCache:
    """The tokens at ``positions`` of a Transformers cache layer, which stand at its beginning, as plain data."""
    keys, values = (
        x[0, :, : len(positions)].clone(memory_format=torch.contiguous_format) for x in (layer.keys, layer.values)
    )
    return LayerCache(keys, values, positions.to(keys.device).expand(len(keys), -1).contiguous())


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers of the language model, in order; none where they are not found."""
    count = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    layers = list(getattr(model.get_decoder(), "layers", None) or [])
    return layers if len(layers) == count else []


@contextmanager
def _narrowing(model: PreTrainedModel, pruner: _Pruner) -> Iterator[None]:
    """In this thread, deeper layers get what ``pruner`` leaves; other threads' passes go through the same hooks."""
    from kvferry.models.attention import current_session

    mine = current_session()

    def hook(index: int) -> Any:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if current_session() is not mine:
                return None
            names = inspect.signature(module.forward).parameters
            return (), pruner.narrow(index, {**dict(zip(names, args, strict=False)), **kwargs})

        return before

    handles = [
        layer.register_forward_pre_hook(hook(index), with_kwargs=True)
        for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_found: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""Why a model cannot be pruned; empty where it can."""


def check_prunable(model: PreTrainedModel, pruning: Pruning) -> None:
    """Refuse a model whose prefill cannot be pruned rightly.

    Its family is tried out on a small random model: a pruned pass must give what a full pass gives in which nobody in
    the deeper layers sees the dropped tokens.

    Raises
    ------
    UnsupportedModelError
        With what differed, or went wrong.
    """
    layers, first = len(decoder_layers(model)), _first(model)
    name = model.config.model_type
    if layers and not first <= pruning.layer < layers:
        why = "since pictures are added to its first layers as well" if first > 1 else "of its layers"
        raise UnsupportedModelError(
            f"{name} can be pruned from layer {first} to {layers - 1} on, {why}; layer={pruning.layer} is not one of "
            "them"
        )
    if model not in _found:
        _found[model] = _tried_out(model) if layers else "its decoder's layers are not where they are elsewhere"
    if _found[model]:
        raise UnsupportedModelError(
            f"the visual tokens of {name} cannot be dropped inside prefill: {_found[model]}; compress after it"
        )


def _first(model: PreTrainedModel) -> int:
    """The first layer from which on no more of a picture is added to hidden states (Qwen3-VL's DeepStack)."""
    vision = getattr(model.config, "vision_config", None)
    return max(1, len(getattr(vision, "deepstack_visual_indexes", None) or ()))


def _tried_out(model: PreTrainedModel) -> str:
    from kvferry.models.check import trial
    from kvferry.models.check.verdict import TOLERANCE, VISIBLE

    with trial._undisturbed():
        try:
            small, inputs = trial._built(type(model), model.config)
            trial.small_models.add(small)
            difference, moved = pruned_against_masked(small, inputs, Pruning(_first(small), 0.4))
        except Exception as error:  # the code of any family may fail in any way
            return trial.describe(error)
    if difference > TOLERANCE:
        return f"a pruned pass differs from a masked one by {difference:.1e} standard deviations of a logit"
    return "" if moved > VISIBLE else "dropping tokens moved nothing, so that the check saw nothing"


def pruned_against_masked(model: PreTrainedModel, inputs: Mapping[str, Any], pruning: Pruning) -> tuple[float, float]:
    """How far a pruned pass is from a full one that masks the same tokens, and how far from a plain one.

    Both in standard deviations of a logit; of keys and values in their own, whichever is more.
    """
    from kvferry.models.attention import attached
    from kvferry.models.layout import layout_of
    from kvferry.models.prefill import read_prompt

    layout = layout_of(model, inputs)
    if not layout.visual.any():
        raise UnsupportedModelError("it was shown no picture")
    length = len(layout) - 1
    with attached(model):
        plain = read_prompt(model, inputs, layout, (), length=length, fingerprint="")
        pruned = _read(model, inputs, layout, pruning, length=length, fingerprint="")
        kept = tuple(layer.positions for layer in pruned.cache)
        selection = Selection(kept, tuple(torch.zeros(x.shape) for x in kept))
        masked = read_prompt(model, inputs, layout, (), length=length, fingerprint="", construct=selection)
    worst = _distance(masked.next_logits, pruned.next_logits)
    for ours, theirs in zip(pruned.cache, masked.cache, strict=True):
        worst = max(worst, _distance(theirs.keys, ours.keys), _distance(theirs.values, ours.values))
    return worst, _distance(plain.next_logits, pruned.next_logits)


def _distance(right: torch.Tensor, found: torch.Tensor) -> float:
    return float((found.float() - right.float()).abs().max() / right.float().std())


def prefill_flops(model: PreTrainedModel, tokens: int, cache: KVCache | None = None) -> int:
    """Floating-point operations of the language model's layers over a prompt, two for a multiplication and an addition.

    Per layer of ``t`` tokens: ``2 t`` times the numbers in its matrices, and ``2 t^2 h d`` for causal attention
    (products with keys and with values, each half a square). The head and the vision tower are not in it.

    Parameters
    ----------
    tokens : int
        Of the whole prompt.
    cache : KVCache, optional
        Of a pruned prefill: how many tokens each layer computed. By default all of them everywhere.
    """
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    total = 0
    for index, layer in enumerate(decoder_layers(model)):
        pending = 0 if cache is None else tokens - cache.length
        t = tokens if cache is None else cache.layers[index].kept + pending
        matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
        total += 2 * t * matrices + 2 * t * t * config.num_attention_heads * width
    return total
