"""One forward pass over a prompt, with evidence; raw Hugging Face inputs in, plain data out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedModel

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.evidence import Evidence, EvidenceRequest, Prefilled
from kvferry.models.attention import Observer, Session, attached, session
from kvferry.models.fingerprint import fingerprint_of
from kvferry.models.layout import Inputs, layout_of
from kvferry.models.support import check_supported


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
        mask: torch.Tensor | None,
        scaling: float,
        causal: bool,
    ) -> None:
        """Look at one layer, see :meth:`kvferry.models.attention.Observer.observe`."""
        ...


class _Watched(Observer):
    """Collects evidence and lets a :class:`Watch` look too."""

    def __init__(self, requests: Sequence[EvidenceRequest], layout: PromptLayout, layers: int, watch: Watch) -> None:
        super().__init__(requests, layout, layers)
        self._watch = watch
        watch.start(layout)

    def observe(self, *seen: Any, **named: Any) -> None:
        super().observe(*seen, **named)
        self._watch.observe(*seen, **named)


def prefill_inputs(
    model: PreTrainedModel,
    inputs: Inputs,
    requests: Sequence[EvidenceRequest] = (),
    *,
    question_mask: npt.ArrayLike | None = None,
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

    Returns
    -------
    Prefilled
        Its cache holds ``n - 1`` tokens; the last one is pending.

    Raises
    ------
    UnsupportedModelError
        A family that cannot be served, more than one prompt, or padding.
    """
    check_supported(model)
    layout = layout_of(model, inputs, question_mask)
    length = max(1, len(layout) - 1)
    with attached(model):
        return read_prompt(model, inputs, layout, requests, length=length, fingerprint=fingerprint_of(model))


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
    """
    began = time.perf_counter()
    past = DynamicCache()
    observer = _observer(model, requests, layout, watch)
    last = length - 1 if scene else len(layout) - 1
    with torch.inference_mode(), session(Session(observer=observer)):
        output = model(
            **model_inputs(model, inputs, layout),
            past_key_values=past,
            use_cache=True,
            logits_to_keep=torch.tensor([last], device=model.device),
        )
    cache = KVCache(
        layers=layers_from(past, length),
        layout=layout.head(length) if scene else layout,
        length=length,
        fingerprint=fingerprint,
        model_name=str(getattr(model, "name_or_path", "")),
    )
    evidence = observer.evidence(length) if observer is not None else Evidence()
    logits = output.logits[0, -1].float().clone()
    return Prefilled(cache, evidence, logits, time.perf_counter() - began)


def _observer(
    model: PreTrainedModel, requests: Sequence[EvidenceRequest], layout: PromptLayout, watch: Watch | None
) -> Observer | None:
    if watch is not None:
        return _Watched(requests, layout, _layer_count(model), watch)
    return Observer(requests, layout, _layer_count(model)) if requests else None


def _layer_count(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def model_inputs(model: PreTrainedModel, inputs: Inputs, layout: PromptLayout) -> dict[str, Any]:
    """What the forward pass gets: everything on the model's device, pixels in its dtype, explicit positions."""
    given = {k: v for k, v in inputs.items() if k not in ("attention_mask", "position_ids") and v is not None}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            given[name] = value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
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
