"""A codec as the coder of one stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvferry.cache import LayerCache
from kvferry.codecs.base import AnyCodec, Codec, JointCoder
from kvferry.errors import InputError
from kvferry.lazy import torch


def for_stage(codec: AnyCodec, lossless: bool) -> AnyCodec:
    """What encodes and decodes where a lossless stage follows, or none does: ``codec`` itself where it is all one."""
    arranged: AnyCodec = _of(codec, "for_stage", lossless)
    return arranged


def encoder_of(codec: AnyCodec, fingerprint: str, layers: int) -> Codec | JointCoder:
    """What encodes one stream of so many layers: ``codec`` itself where it remembers nothing."""
    coder: Codec | JointCoder = _of(_of(codec, "for_layers", layers), "encoder", fingerprint)
    return coder


def decoder_of(codec: AnyCodec, fingerprint: str) -> Codec | JointCoder:
    """What decodes one stream: ``codec`` itself where it remembers nothing."""
    coder: Codec | JointCoder = _of(codec, "decoder", fingerprint)
    return coder


def _of(codec: Any, which: str, about: str | int) -> Any:
    make = getattr(codec, which, None)
    return codec if make is None else make(about)


def stack(layers: Sequence[LayerCache]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values ``[layers, kv_heads, k, head_dim]`` and positions ``[k]`` of layers that keep the same tokens.

    Raises
    ------
    InputError
        They do not, or their shapes differ.
    """
    first = layers[0].positions[:1]
    shapes = {(x.keys.shape, x.values.shape) for x in layers}
    if len(shapes) > 1 or not all(torch.equal(x.positions, first.expand_as(x.positions)) for x in layers):
        raise InputError(
            "this codec codes a token's vectors of all layers together, but layers or heads keep different tokens; "
            "add budget=shared to the selection (leaveout@0.1,budget=shared), or choose a codec such as int4"
        )
    return torch.stack([x.keys for x in layers]), torch.stack([x.values for x in layers]), first[0]
