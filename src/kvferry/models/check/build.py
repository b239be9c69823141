"""A small random model of a family, and prompts for it."""

from __future__ import annotations

import copy

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from kvferry.models.check.tiny import FIRST_SPECIAL

WORDS = 40
MOST = 120_000_000
"""Parameters of a model that may still be made: half a gigabyte."""
SPREAD = 2.0
"""Weights are this many times larger than what keeps a vector's length, so that attention is far from even."""


def small_model(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Random weights from a generator of its own, where matrices are concerned; the rest as the family begins."""
    _check_size(kind, config)
    torch.default_generator.manual_seed(0)
    model = kind(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan = parameter.shape[-2] if "experts" in name and parameter.ndim == 3 else parameter[0].numel()
                parameter.normal_(std=SPREAD * fan**-0.5, generator=draw)
            elif "sink" in name:
                parameter.normal_(generator=draw)
        model.requires_grad_(False)
    model.generation_config = GenerationConfig()
    return model


def _check_size(kind: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        size = sum(x.numel() for x in kind(copy.deepcopy(config)).parameters())
    if size > MOST:
        raise ValueError(f"its configuration cannot be made small: {size:,} parameters are left")


def words(count: int, seed: int = 0) -> torch.Tensor:
    """Token ids ``[count]`` that mean nothing to the model."""
    return torch.randint(5, FIRST_SPECIAL, (count,), generator=torch.Generator().manual_seed(seed))


def text_inputs() -> dict[str, torch.Tensor]:
    """A prompt of words."""
    return {"input_ids": words(WORDS)[None]}
