"""Kept tokens <-> bytes, one layer at a time."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from kvferry.cache import PromptLayout
from kvferry.errors import CorruptError, InputError

Shape = tuple[int, int, int]
LIMIT = 3.3e38
"""Just under the largest bfloat16 (3.39e38), so that a scale that is rounded up cannot decode to infinity."""


@runtime_checkable
class Codec(Protocol):
    """A codec is a frozen dataclass with these members.

    ``encode`` gets keys and values of one layer, ``[kv_heads, kept, head_dim]`` of any float dtype, with the
    prompt index of every entry (``[kv_heads, kept]``) and the layout; it returns self-contained bytes.
    ``decode`` gets those bytes and the shapes back and must refuse, by :class:`kvferry.errors.CorruptError`,
    a payload of the wrong size before it allocates anything.
    """

    @property
    def name(self) -> str:
        """What a recipe calls it: its key in :data:`kvferry.codecs.CODECS`."""
        ...

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes: ...

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def not_finite(layer: int, what: str) -> InputError:
    """What is raised over NaN, infinity and what bfloat16 cannot hold, by the name of the layer."""
    return InputError(
        f"the {what} of layer {layer} hold NaN, infinity or numbers beyond {LIMIT:g}; look for what broke the "
        "prefill (a float16 overflow is the usual cause: load the model in bfloat16)"
    )


def check_size(layer: int, payload: bytes, expected: int) -> None:
    """Refuse a payload that is not exactly as long as its shapes say."""
    if len(payload) != expected:
        raise CorruptError(f"layer {layer}: a payload of {len(payload)} bytes, where its shapes need {expected}")
