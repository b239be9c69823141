"""Keys and values each by themselves: what most codecs share."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from kvferry.cache import PromptLayout
from kvferry.codecs.base import LIMIT, Shape
from kvferry.codecs.checks import check_size, check_words, not_finite
from kvferry.codecs.packing import Bytes, Words, join_words, split_words
from kvferry.lazy import torch

What = Literal["keys", "values"]


class Side(Protocol):
    """What a codec defines to be written one side at a time; :class:`Sided` and ``apart`` do the rest."""

    def encode_side(self, layer: int, what: What, tensor: torch.Tensor, positions: torch.Tensor) -> bytes:
        """``tensor`` is ``[kv_heads, kept, head_dim]`` of any float dtype, ``positions`` ``[kv_heads, kept]``.

        Raises :class:`~kvferry.errors.InputError` on NaN, infinity, or what bfloat16 cannot hold.
        """
        ...

    def side_size(self, what: What, shape: Shape, positions: torch.Tensor) -> int:
        """How many bytes :meth:`encode_side` gives."""
        ...

    def decode_side(self, what: What, octets: Bytes, shape: Shape, positions: torch.Tensor) -> torch.Tensor:
        """``shape`` in bfloat16 from :meth:`side_size` bytes."""
        ...


class Sided:
    """``encode`` and ``decode`` of a codec that has the members of :class:`Side`. Bytes: keys, then values."""

    def encode(
        self: Side, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Raises :class:`~kvferry.errors.InputError` on NaN, infinity, or what bfloat16 cannot hold."""
        return self.encode_side(layer, "keys", keys, positions) + self.encode_side(layer, "values", values, positions)

    def decode(
        self: Side,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in bfloat16."""
        split = self.side_size("keys", key_shape, positions)
        check_size(layer, payload, split + self.side_size("values", value_shape, positions))
        octets = np.frombuffer(payload, np.uint8)
        return (
            self.decode_side("keys", octets[:split], key_shape, positions),
            self.decode_side("values", octets[split:], value_shape, positions),
        )


def finite(layer: int, what: str, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32; :class:`~kvferry.errors.InputError` where bfloat16 could not hold it."""
    numbers = tensor.float()
    if numbers.numel() and not bool(numbers.abs().amax() <= LIMIT):
        raise not_finite(layer, what)
    return numbers


def to_words(tensor: torch.Tensor) -> bytes:
    """Two bytes a number, rounded to the nearest bfloat16; all high bytes, then all low bytes."""
    return split_words(words_of(tensor.to(torch.bfloat16)).reshape(-1))


def from_words(octets: Bytes) -> torch.Tensor:
    """Undo :func:`to_words`: a flat tensor in float32; :class:`~kvferry.errors.CorruptError` on NaN and infinity."""
    words = join_words(octets)
    check_words(words)
    return bfloat16_of(words).float()


def bfloat16_of(words: Words) -> torch.Tensor:
    """The bfloat16 numbers whose bits are ``words``."""
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)


def words_of(numbers: torch.Tensor) -> Words:
    """The bits of a bfloat16 tensor, sharing its memory where it lies there in C order on the CPU."""
    return numbers.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def round_up(numbers: torch.Tensor) -> torch.Tensor:
    """The smallest bfloat16 not below each of ``numbers`` (float32, finite), still as float32."""
    bits = numbers.contiguous().view(torch.int32)
    return torch.where(bits < 0, bits & ~0xFFFF, (bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
