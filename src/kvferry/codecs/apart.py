"""Text and visual tokens, and keys and values, each in a codec of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvferry.cache import PromptLayout
from kvferry.codecs.base import Shape
from kvferry.codecs.bf16 import BF16
from kvferry.codecs.checks import check_size
from kvferry.codecs.fp8 import FP8
from kvferry.codecs.grammar import named_text, parse_named
from kvferry.codecs.integer import Integer
from kvferry.codecs.kivi import KIVI
from kvferry.codecs.side import Side, What
from kvferry.codecs.turbo import Turbo
from kvferry.lazy import torch

SIDED: tuple[BF16 | Integer | FP8 | KIVI | Turbo, ...] = (
    BF16(),
    *(Integer(bits) for bits in range(1, 9)),
    FP8(),
    KIVI(),
    Turbo(),
)
"""Codecs that write keys and values each by themselves."""
_TABLE = {codec.name: codec for codec in SIDED}
_BOTH: tuple[What, What] = ("keys", "values")


@dataclass(frozen=True)
class Apart:
    """``apart,text=int8,visual=int2/int4``: text tokens in INT8, keys of visual tokens in INT2, their values in INT4.

    What an operator needs to give each modality its own precision, the modality-aware compression that the sources
    ask for (W.-L. Cheng and W. Liao, research notes on KV-cache compression for vision-language models). A token is
    visual where the layout says so; nothing is sent about it.

    Bytes: keys of the text tokens, their values, keys of the visual tokens, their values. Where heads keep different
    tokens, so that they hold differently many of one modality, they stand end to end as in a layer of unequal heads.

    Parameters
    ----------
    text, visual : str
        A codec that writes keys and values each by itself (``bf16``, ``int1`` to ``int8``, ``fp8``, ``kivi:B``,
        ``turbo:B``), with its default options, or two of them: ``KEYS/VALUES``.
    """

    text: str = "int8"
    visual: str = "int4"
    name: ClassVar[str] = "apart"

    def __post_init__(self) -> None:
        for field in ("text", "visual"):
            texts = [named_text(_TABLE, side) for side in _sides(getattr(self, field))]
            object.__setattr__(self, field, "/".join(dict.fromkeys(texts)))

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Raises :class:`~kvferry.errors.InputError` on NaN, infinity, or what bfloat16 cannot hold."""
        both = {"keys": keys, "values": values}
        return b"".join(
            side.encode_side(layer, what, _take(both[what], where), _take(positions, where))
            for where, what, side in self._quarters(positions, layout)
        )

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in bfloat16."""
        shapes = {"keys": key_shape, "values": value_shape}
        todo = []
        for where, what, side in self._quarters(positions, layout):
            chosen = _take(positions, where)
            shape = (*chosen.shape, shapes[what][2])
            todo.append((where, what, side, chosen, shape, side.side_size(what, shape, chosen)))
        check_size(layer, payload, sum(size for *_, size in todo))
        octets = np.frombuffer(payload, np.uint8)
        out = {what: torch.empty(shape, dtype=torch.bfloat16) for what, shape in shapes.items()}
        for where, what, side, chosen, shape, size in todo:
            out[what][where] = side.decode_side(what, octets[:size], shape, chosen).flatten(0, 1)
            octets = octets[size:]
        return out["keys"], out["values"]

    def _quarters(self, positions: torch.Tensor, layout: PromptLayout) -> Iterator[tuple[torch.Tensor, What, Side]]:
        """Which tokens (bool ``[kv_heads, kept]``), which side, by which codec."""
        visual = torch.from_numpy(layout.visual).to(positions.device)[positions]
        for where, text in ((~visual, self.text), (visual, self.visual)):
            for what, side in zip(_BOTH, _sides(text), strict=True):
                yield where, what, side


def _sides(text: str) -> tuple[Side, Side]:
    """The codecs of keys and of values in ``CODEC`` or ``KEYS/VALUES``."""
    keys, slash, values = text.partition("/")
    return parse_named(_TABLE, keys), parse_named(_TABLE, values if slash else keys)


def _take(tensor: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The entries where ``where`` is true: ``[kv_heads, k, ...]`` if all heads have equally many, else one long row."""
    counts = where.sum(1)
    rows = len(where) if bool((counts == counts[0]).all()) else 1
    return tensor[where].reshape(rows, -1, *tensor.shape[2:])
