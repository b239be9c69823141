"""One forward pass over a prompt, with evidence; raw Hugging Face inputs in, plain data out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedModel

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.evidence import Evidence, EvidenceRequest, Prefilled
from kvferry.models.attention import Observer, Session, attached, session
from kvferry.models.blockwise import Rule
from kvferry.models.embeds import placed
from kvferry.models.fingerprint import fingerprint_of
from kvferry.models.layout import Inputs, layout_of
from kvferry.models.pruning import Pruning, check_alone, read_pruned
from kvferry.models.rotary import frequencies_at, rotary_of
from kvferry.models.support import check_supported, kv_shapes, tied_heads
from kvferry.models.tower_pruning import TowerPruning, read_zipped
from kvferry.rope import Rotary
from kvferry.selection.base import Selection
from kvferry.selection.eviction import evict


class Watch(Protocol):
    """Somebody else who wants to see attention while a prompt is read, beside what evidence is made of."""

    def start(self, layout: PromptLayout) -> None:
        """A prompt of this layout follows."""
        ...

    def observe(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        rule: Rule,
    ) -> None:
        """Look at one layer, see :meth:`kvferry.models.attention.Observer.observe`."""
        ...


class _Watched(Observer):
    """Collects evidence and lets a :class:`Watch` look too."""

    def __init__(
        self,
        requests: Sequence[EvidenceRequest],
        layout: PromptLayout,
        layers: int,
        rotary: Sequence[Rotary | None],
        watch: Watch,
    ) -> None:
        super().__init__(requests, layout, layers, rotary)
        self._watch = watch
        watch.start(layout)

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, rule: Rule, first: int = 0) -> None:
        super().observe(layer, query, key, rule, first)
        self._watch.observe(layer, query, key, rule)


def prefill_inputs(
    model: PreTrainedModel,
    inputs: Inputs,
    requests: Sequence[EvidenceRequest] = (),
    *,
    question_mask: npt.ArrayLike | None = None,
    construct: Selection | None = None,
    prune: Pruning | TowerPruning | None = None,
) -> Prefilled:
    """Read a prompt given as raw Hugging Face inputs; works for families without a processor.

    Parameters
    ----------
    inputs : mapping
        ``input_ids`` ``[1, n]`` and whatever the model's processor returned beside.
    requests : sequence of EvidenceRequest
        What to observe of attention.
    question_mask : bool ``[n]``, optional
        True on the question, see :func:`layout_of`.
    construct : Selection, optional
        See :func:`read_prompt`.
    prune : Pruning or TowerPruning, optional
        Drop visual tokens on the way through the layers, or before them; then nothing may be observed.

    Returns
    -------
    Prefilled
        Its cache stands for ``n - 1`` tokens; the last one is pending.

    Raises
    ------
    UnsupportedModelError
        A family that cannot be served, more than one prompt, or padding.
    """
    check_supported(model)
    layout, fingerprint = layout_of(model, inputs, question_mask), fingerprint_of(model)
    length = max(1, len(layout) - 1)
    with attached(model):
        return read_prompt(
            model, inputs, layout, requests, length=length, fingerprint=fingerprint, construct=construct, prune=prune
        )


def read_prompt(
    model: PreTrainedModel,
    inputs: Inputs,
    layout: PromptLayout,
    requests: Sequence[EvidenceRequest],
    *,
    length: int,
    fingerprint: str,
    scene: bool = False,
    watch: Watch | None = None,
    construct: Selection | None = None,
    prune: Pruning | TowerPruning | None = None,
) -> Prefilled:
    """The forward pass itself; the model must have :func:`kvferry.models.attention.attach` applied.

    Parameters
    ----------
    length : int
        Tokens the cache keeps.
    scene : bool
        Forget everything after ``length``: the layout is cut too, and the logits are those after the last kept
        token. Otherwise they are those after the whole prompt.
    watch : Watch, optional
        Sees every layer's queries and keys as well.
    construct : Selection, optional
        Apply this selection, made from an ordinary prefill of the same prompt, while the cache is built: in every
        layer and KV head, a token that the selection drops there is hidden from all other tokens, from the first row
        on. It still passes through the network and sees itself and what is kept before it. So kept keys and values
        never held what was dropped, unlike after an eviction. Tokens behind ``length`` (the pending one, a proxy
        question) are not hidden. The cache holds exactly the kept tokens; evidence is that of the masked pass.
    prune : Pruning or TowerPruning, optional
        See :func:`kvferry.models.pruning.read_pruned` and
        :func:`kvferry.models.tower_pruning.read_zipped`, which read the prompt then, if it shows a picture.

    Raises
    ------
    EvidenceError
        A request has no rows in this prompt, or a layer has no fixed rotation where one is needed.
    InputError
        ``construct`` was made for another model or another prompt.
    UnsupportedModelError
        What follows a scene changes how the model turns its keys.
    """
    check_alone(prune, requests, watch, construct, scene)
    if isinstance(prune, TowerPruning) and layout.visual.any():
        return read_zipped(model, inputs, layout, prune, length=length, fingerprint=fingerprint, scene=scene)
    if isinstance(prune, Pruning) and layout.visual.any():
        return read_pruned(model, inputs, layout, prune, length=length, fingerprint=fingerprint)
    began = time.perf_counter()
    past, made = DynamicCache(), layout.head(length) if scene else layout
    if frequencies_at(model, made.next_position) != frequencies_at(model, layout.next_position):
        raise UnsupportedModelError(
            f"{model.config.model_type} turns the keys of this scene otherwise once {len(layout) - length} more tokens "
            "follow; leave proxy_question out, with a selection that needs none, or shorten the scene"
        )
    observer = _observer(model, requests, layout, watch)
    dropped = None if construct is None else _dropped(model, construct, length, len(layout))
    last = length - 1 if scene else len(layout) - 1
    with torch.inference_mode(), session(Session(observers=[observer] if observer else [], dropped=dropped)):
        output = model(
            **model_inputs(model, inputs, layout),
            past_key_values=past,
            use_cache=True,
            logits_to_keep=torch.tensor([last], device=model.device),
        )
    cache = KVCache(
        layers=layers_from(past, length),
        layout=made,
        length=length,
        fingerprint=fingerprint,
        model_name=str(getattr(model, "name_or_path", "")),
        tied_heads=tied_heads(model),
    )
    if construct is not None:
        cache = evict(cache, construct)
    evidence = observer.evidence(length) if observer is not None else Evidence()
    logits = output.logits[0, -1].float().clone()
    return Prefilled(cache, evidence, logits, time.perf_counter() - began)


def _observer(
    model: PreTrainedModel, requests: Sequence[EvidenceRequest], layout: PromptLayout, watch: Watch | None
) -> Observer | None:
    layers, rotary = _layer_count(model), rotary_of(model)
    if watch is not None:
        return _Watched(requests, layout, layers, rotary, watch)
    return Observer(requests, layout, layers, rotary) if requests else None


def _layer_count(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _dropped(model: PreTrainedModel, kept: Selection, length: int, n: int) -> list[torch.Tensor]:
    """Per layer the keys that a selection of the first ``length`` tokens drops, bool ``[kv_heads, n]``."""
    heads = [heads for heads, _ in kv_shapes(model)]
    layers = len(heads)
    if len(kept.positions) != layers or any(len(kept.heads(i)) != count for i, count in enumerate(heads)):
        each = ", ".join(map(str, sorted(set(heads))))
        raise InputError(f"the selection does not fit {layers} layers of {each} KV heads; select with this model")
    hidden = [torch.arange(n).expand(count, n) < length for count in heads]
    if any(len(x) and int(x.max()) >= length for x in kept.positions):
        raise InputError(f"the selection names tokens beyond the prompt's {length}; select with this very prompt")
    for layer in range(layers):
        for head, positions in enumerate(kept.heads(layer)):
            hidden[layer][head, positions[0].cpu()] = False
    return [x.to(model.device) for x in hidden]


def model_inputs(model: PreTrainedModel, inputs: Inputs, layout: PromptLayout) -> dict[str, Any]:
    """What the forward pass gets: everything on the model's device, pixels in its dtype, explicit positions."""
    given = {k: v for k, v in inputs.items() if k not in ("attention_mask", "position_ids") and v is not None}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            given[name] = value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
    if "visual_embeds" in given:
        given["inputs_embeds"] = placed(model, given.pop("input_ids"), layout.visual, given.pop("visual_embeds"))
    positions = torch.from_numpy(layout.positions).long().to(model.device)
    given["position_ids"] = positions if len(positions) == 1 else positions[:, None]
    return given


def layers_from(past: Any, length: int) -> tuple[LayerCache, ...]:
    """The first ``length`` tokens of a Transformers cache that kept everything, as plain data."""
    layers = []
    for layer in past.layers:
        keys = layer.keys[0, :, :length].clone(memory_format=torch.contiguous_format)
        values = layer.values[0, :, :length].clone(memory_format=torch.contiguous_format)
        positions = torch.arange(length, device=keys.device).expand(len(keys), -1).contiguous()
        layers.append(LayerCache(keys, values, positions))
        layer.keys = layer.values = None
    return tuple(layers)


def requests_of(recipe: Any) -> tuple[EvidenceRequest, ...]:
    """What a recipe, or its text, wants to be observed; nothing where there is none."""
    if recipe is None:
        return ()
    if isinstance(recipe, str):
        from kvferry.recipe import Recipe

        recipe = Recipe.parse(recipe)
    return tuple(recipe.requests)
