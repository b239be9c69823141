"""Mixed precision: a width of its own for every layer, for keys and values, for visual and text tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeAlias

from kvferry.cache import PromptLayout
from kvferry.codecs.base import Codec, Shape
from kvferry.codecs.bf16 import BF16
from kvferry.codecs.checks import check_size
from kvferry.codecs.integer import Integer
from kvferry.codecs.packing import packed_size
from kvferry.errors import CorruptError, FingerprintError, InputError
from kvferry.lazy import torch

PARTS = ("visual_keys", "text_keys", "visual_values", "text_values")
"""What of a layer has a width of its own, in the order in which a payload holds it."""
WIDTHS = (*range(1, 9), 16)
"""Bits a number may take: the integers of :class:`~kvferry.codecs.integer.Integer`, or bfloat16."""

Widths = tuple[int, int, int, int]
"""Bits of one layer's :data:`PARTS`."""
_HEAD = 2
Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"


@dataclass(frozen=True)
class Mixed:
    """Widths from a profile that was measured on the model.

    The sources' mixed precision by diagnosis (W.-L. Cheng and W. Liao, "Task-Aware KV-Cache Compression for
    Bandwidth-Efficient Collaborative LLM Inference", 2026) keeps whole layers at 16 bit; here keys and values, visual
    and text tokens may differ too. ``kvferry diagnose`` writes profiles.

    Bytes of a layer: two that say its widths, then its four :data:`PARTS`, each as its codec writes it with all heads
    in one row. A payload says all that decoding needs: who only decodes needs no profile and opens none.

    Parameters
    ----------
    profile : str
        A file by ``kvferry diagnose``. It is read when a stream is begun to be written.
    """

    profile: str = ""
    name: ClassVar[str] = "mixed"

    def __post_init__(self) -> None:
        if set(self.profile) & set(",|") or self.profile != self.profile.strip():
            raise InputError(f"the profile {self.profile!r} cannot stand in a recipe; give it a name without , and |")

    def encoder(self, fingerprint: str) -> ByPart:
        """What encodes a stream of the model with this fingerprint.

        Raises
        ------
        InputError
            There is no profile, it cannot be read, or nothing says which model made the cache.
        FingerprintError
            It was measured on another model.
        """
        return ByPart(read_bits(self.profile, fingerprint))

    def for_layers(self, layers: int) -> MixedFor:
        """What encodes a cache of so many layers."""
        return MixedFor(self, layers)

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Refused: only :meth:`encoder` knows the model, without which no profile can be checked."""
        return self.encoder("").encode(layer, keys, values, positions, layout)

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> Pair:
        """Keys and values in bfloat16."""
        return ByPart.decode(layer, payload, key_shape, value_shape, positions, layout)


class MixedFor(NamedTuple):
    """:class:`Mixed` for a cache of ``layers`` layers, to which a profile must fit."""

    mixed: Mixed
    layers: int

    def encoder(self, fingerprint: str) -> ByPart:
        """See :meth:`Mixed.encoder`; InputError where the profile is for another number of layers."""
        by_part = self.mixed.encoder(fingerprint)
        if len(by_part.bits) != self.layers:
            raise InputError(
                f"the profile knows {len(by_part.bits)} layers, but the cache has {self.layers}; make it anew by "
                f"`kvferry diagnose MODEL --out {self.mixed.profile}`"
            )
        return by_part


@dataclass(frozen=True)
class ByPart:
    """Encodes every layer by given widths.

    Parameters
    ----------
    bits : tuple of :data:`Widths`, ``[layers]``
    """

    bits: tuple[Widths, ...]
    name: ClassVar[str] = Mixed.name

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Raises :class:`~kvferry.errors.InputError` on NaN, infinity, or what bfloat16 cannot hold."""
        if layer >= len(self.bits):
            raise InputError(f"the profile knows {len(self.bits)} layers, but the cache has more; make it anew")
        bits, visual = self.bits[layer], _visual(positions, layout).to(keys.device)
        a, b, c, d = (x % 16 for x in bits)
        pieces = [bytes([a | b << 4, c | d << 4])]
        for what, width, (tensor, mask) in zip(PARTS, bits, _by_part(keys, values, visual), strict=True):
            part = tensor[mask][None]
            pair = (part, part[:, :0]) if what.endswith("keys") else (part[:, :0], part)
            pieces.append(_codec(width).encode(layer, *pair, positions, layout))
        return b"".join(pieces)

    @staticmethod
    def decode(
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> Pair:
        """Keys and values in bfloat16."""
        bits, visual = _read_widths(layer, payload), _visual(positions, layout)
        numbers = int(visual.sum()), int((~visual).sum())
        vectors, dims = 2 * numbers, (key_shape[2],) * 2 + (value_shape[2],) * 2
        sizes = [part_size(*part) for part in zip(vectors, dims, bits, strict=True)]
        check_size(layer, payload, _HEAD + sum(sizes))
        spans = pairwise(accumulate(sizes, initial=_HEAD))
        keys, values = (torch.empty(shape, dtype=torch.bfloat16) for shape in (key_shape, value_shape))
        for (tensor, mask), width, count, dim, span in zip(
            _by_part(keys, values, visual), bits, vectors, dims, spans, strict=True
        ):
            shapes = (1, count, dim), (1, 0, dim)
            part, _ = _codec(width).decode(layer, payload[slice(*span)], *shapes, positions, layout)
            tensor[mask] = part[0]
        return keys, values


def part_size(vectors: int, dim: int, bits: int) -> int:
    """Bytes of ``vectors`` (tokens times heads) of ``dim`` numbers, scales included."""
    return packed_size(vectors * dim, bits) + (0 if bits == 16 else 2 * vectors)


def read_bits(path: str, fingerprint: str) -> tuple[Widths, ...]:
    """The widths in a profile of the model with this fingerprint; raises as :meth:`Mixed.encoder` does."""
    if not path:
        raise InputError("mixed needs a profile, as in full|mixed@mixed.json; `kvferry diagnose MODEL` makes one")
    try:
        profile = json.loads(Path(path).read_text())
        columns, measured_on = [profile["bits"][part] for part in PARTS], str(profile["fingerprint"])
        bits = tuple(zip(*columns, strict=True))
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path} is no profile; make one by `kvferry diagnose MODEL --out {path}`") from None
    if not bits or not all(type(width) is int and width in WIDTHS for layer in bits for width in layer):
        raise InputError(f"{path}: a width is 1 to 8 or 16 bits; make it anew by `kvferry diagnose MODEL --out {path}`")
    if not fingerprint:
        raise InputError(f"nothing says which model made this cache, so {path} cannot be checked; choose int4 or int8")
    if measured_on != fingerprint:
        raise FingerprintError(
            f"{path} was measured on another model than the one that made this cache; "
            f"run `kvferry diagnose MODEL --out {path}` for this one"
        )
    return bits


def _codec(bits: int) -> Codec:
    return BF16() if bits == 16 else Integer(bits)


def _visual(positions: torch.Tensor, layout: PromptLayout) -> torch.Tensor:
    """Which stored tokens are visual, bool ``[kv_heads, kept]``."""
    return torch.from_numpy(layout.visual)[positions.cpu()]


def _by_part(keys: torch.Tensor, values: torch.Tensor, visual: torch.Tensor) -> list[Pair]:
    """The tensor and the mask of every one of :data:`PARTS`."""
    return [(tensor, mask) for tensor in (keys, values) for mask in (visual, ~visual)]


def _read_widths(layer: int, payload: bytes) -> Widths:
    check_size(layer, payload[:_HEAD], _HEAD)
    low, high = payload[0], payload[1]
    bits = (low & 15 or 16, low >> 4 or 16, high & 15 or 16, high >> 4 or 16)
    if not all(width in WIDTHS for width in bits):
        raise CorruptError(f"layer {layer}: widths of {bits} bits, which do not exist")
    return bits
