"""Ways of running a model that :func:`kvferry.models.compressing.compressing` cannot serve, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from kvferry.errors import InputError, UnsupportedModelError
from kvferry.models.support import text_config

_WRAPPERS = ("_orig_mod", "get_base_model", "module", "pretrained_model", "model")
"""Where torch.compile, PEFT, data parallelism, TRL, a pipeline and ``kvferry.VLM`` keep the model."""

_ROLLING = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "penalty_alpha")
_ROLLED_BACK = "it tries tokens and has the cache rolled back, which a compressed one cannot be; leave it out"
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_ROLLING, (bool, _ROLLED_BACK)),
    "guidance_scale": (lambda x: x != 1, "it reads a second, unconditional prompt beside yours; leave it out"),
    "use_cache": (lambda x: not x, "there is then no cache to compress; call generate() with use_cache=True"),
    "cache_implementation": (
        lambda x: x != "dynamic", "such a cache cannot be compressed; leave cache_implementation at its default",
    ),
    "output_attentions": (
        bool, "attention runs on PyTorch's SDPA meanwhile, which keeps no weights; look at them outside the block",
    ),
}  # fmt: skip
"""Options of ``generate()``: when one is refused, and why."""


def underlying(model: Any) -> PreTrainedModel:
    """The Transformers model that runs when ``model``, which may be wrapped, does.

    Raises
    ------
    InputError
        There is none.
    UnsupportedModelError
        It is copied to several devices, has no head to generate with, or never runs its own forward pass.
    """
    given = model
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, torch.nn.DataParallel) and len(model.device_ids) > 1:
            raise UnsupportedModelError("DataParallel copies the model for every pass; pass its .module and call that")
        inner = next((x for name in _WRAPPERS if (x := getattr(model, name, None)) is not None), None)
        inner = inner() if inspect.ismethod(inner) else inner
        if inner is None or inner is model:
            raise InputError(f"compressing() takes a model of Transformers, not a {type(given).__name__}")
        model = inner
    name = type(model).__name__
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{name} has no generate(); pass the whole model, with its language-model head, to compressing()"
        )
    own = inspect.unwrap(type(model).generate)
    if own is not inspect.unwrap(GenerationMixin.generate) and "super" not in own.__code__.co_names:
        raise UnsupportedModelError(
            f"{name}.generate() is the family's own: it hands embeddings to an inner model's generate(), where what "
            "each token is cannot be seen any more; this family cannot be compressed"
        )
    return model


def check_options(model: PreTrainedModel, given: dict[str, Any]) -> None:
    """Refuse what a call of ``generate()`` asks for and does not go with a compressed cache.

    Parameters
    ----------
    given : mapping
        Its arguments by name.

    Raises
    ------
    UnsupportedModelError
        With the option's name, the reason and what to do.
    """
    configs = (model.generation_config, given.get("generation_config"))
    layers = [x.to_dict() for x in configs if x is not None] + [given]
    for name, (unwanted, why) in _REFUSED.items():
        value = next((x[name] for x in reversed(layers) if x.get(name) is not None), None)
        if value is not None and unwanted(value):
            raise UnsupportedModelError(f"{name} does not go with compressing(): {why}")


def check_pass(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Refuse a forward pass that keeps no cache, or is to hand out attention weights."""
    config = text_config(model)
    for name in ("use_cache", "output_attentions"):
        unwanted, why = _REFUSED[name]
        value = inputs.get(name)
        value = getattr(config, name, None) if value is None else value
        if value is not None and unwanted(value):
            raise UnsupportedModelError(f"{name}={value} does not go with compressing(): {why}")
