"""KIVI: asymmetric integers, keys per channel and values per token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np

from kvferry.codecs.base import Shape
from kvferry.codecs.packing import Bytes, pack, packed_size, unpack
from kvferry.codecs.side import Sided, What, finite, from_words, round_up, to_words
from kvferry.errors import InputError
from kvferry.lazy import torch


@dataclass(frozen=True)
class KIVI(Sided):
    """Groups of ``group`` numbers share their least and greatest number, ``lo`` and ``hi``: keys of one channel over
    tokens, values of one token over channels. ``q = round((t - lo) / s)``, ``s = (hi - lo) / (2^bits - 1)``.

    Z. Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (arXiv 2402.02750).
    ``|t - (lo + q s)| <= s / 2`` for every number. Decodes in float32 arithmetic to bfloat16.

    Deviations: ``lo`` and ``hi`` are written instead of a zero point and a scale, in as many bytes: bfloat16 caches
    then lose nothing to their rounding, and no difference overflows. The window is 32 tokens where the paper has up to
    128, for kept tokens are few. Where a number of tokens or channels is no multiple of ``group``, the last group is
    shorter: the paper leaves such keys in 16 bits, which of a pruned cache might be all.

    Each head keeps its own window, in layers of unequal heads too. Bytes, keys first: per head (per layer where heads
    are equal) all ``lo``, then all ``hi`` (high bytes, then low bytes), packed numbers (``[kv_heads, head_dim,
    tokens]``), the window (``[kv_heads, head_dim, window]``; high bytes, then low bytes).

    Parameters
    ----------
    bits : int
        1 to 8, really packed.
    group : int
        How many numbers share their bounds; at least 2.
    residual : int
        So many of the most recent kept tokens stay in bfloat16.
    """

    bits: int = 2
    group: int = 32
    residual: int = 32
    name: ClassVar[str] = "kivi"
    argument: ClassVar[str] = "bits"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"kivi:{self.bits} does not exist; choose kivi:1 to kivi:8")
        if self.group < 2 or self.residual < 0:
            raise InputError("kivi needs a group of at least 2 numbers and a residual of at least 0 tokens")

    def encode_side(self, layer: int, what: What, tensor: torch.Tensor, positions: torch.Tensor) -> bytes:
        """See :class:`~kvferry.codecs.side.Side`."""
        numbers = finite(layer, what, tensor)
        heads, kept, dim = tensor.shape
        parts = []
        for start, part in self._parts(what, (heads, kept, dim), positions):
            older = numbers[:, start : start + part.tokens]
            window = numbers[:, start + part.tokens : start + part.tokens + part.window]
            low, high, levels = self._quantize(older.mT if what == "keys" else older)
            by_channel = levels if what == "keys" else levels.mT
            packed = pack(by_channel.cpu().contiguous().numpy().reshape(-1), self.bits)
            parts += [to_words(torch.stack([low, high])), packed.tobytes(), to_words(window.mT)]
        return b"".join(parts)

    def side_size(self, what: What, shape: Shape, positions: torch.Tensor) -> int:
        """Bounds, packed numbers and window of every part."""
        return sum(sum(part.sizes(self.bits)) for _, part in self._parts(what, shape, positions))

    def decode_side(self, what: What, octets: Bytes, shape: Shape, positions: torch.Tensor) -> torch.Tensor:
        """See :class:`~kvferry.codecs.side.Side`."""
        heads, _, dim = shape
        out = torch.empty(shape, dtype=torch.bfloat16)
        for start, part in self._parts(what, shape, positions):
            bounds, packed, window = part.sizes(self.bits)
            low, high = from_words(octets[:bounds]).reshape(2, heads, *part.grouped)
            levels = torch.from_numpy(
                unpack(octets[bounds : bounds + packed], self.bits, part.numbers).astype(np.float32)
            )
            by_channel = levels.reshape(heads, dim, part.tokens)
            lines = by_channel if what == "keys" else by_channel.mT
            numbers = self._restore(low, high, lines)
            middle, stop = start + part.tokens, start + part.tokens + part.window
            out[:, start:middle] = numbers.mT if what == "keys" else numbers
            recent = from_words(octets[bounds + packed : bounds + packed + window])
            out[:, middle:stop] = recent.reshape(heads, dim, part.window).mT
            octets = octets[bounds + packed + window :]
        return out

    def _parts(self, what: What, shape: Shape, positions: torch.Tensor) -> Iterator[tuple[int, _Part]]:
        """Where each part starts, and its sizes; a layer of unequal heads has one per head."""
        heads, _, dim = shape
        start = 0
        for length in _runs(positions):
            window = min(length, self.residual)
            tokens = length - window
            grouped = (dim, -(-tokens // self.group)) if what == "keys" else (tokens, -(-dim // self.group))
            yield start, _Part(heads, dim, tokens, window, grouped)
            start += length

    def _quantize(self, lines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bounds ``[kv_heads, lines, groups]`` and levels ``[kv_heads, lines, n]`` (uint8) of ``[kv_heads, lines, n]``,
        grouped along the last axis."""
        heads, count, n = lines.shape
        groups = -(-n // self.group)
        filled = lines[..., torch.arange(groups * self.group, device=lines.device).clamp_(max=n - 1)]
        by_group = filled.reshape(heads, count, groups, self.group)
        low, high = -round_up(-by_group.amin(-1)), round_up(by_group.amax(-1))
        half_step = self._half_step(low, high)[..., None]
        levels = (by_group / 2 - low[..., None] / 2) / torch.where(half_step > 0, half_step, 1.0)
        levels = levels.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        return low, high, levels.reshape(heads, count, groups * self.group)[..., :n]

    def _restore(self, low: torch.Tensor, high: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        index = torch.arange(levels.shape[-1]) // self.group
        half_step = self._half_step(low, high)[..., index]
        return torch.mul(levels * half_step + low[..., index] / 2, 2)

    def _half_step(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Half of the step: ``hi - lo`` itself may be beyond float32."""
        return torch.div(high / 2 - low / 2, 2**self.bits - 1)


class _Part(NamedTuple):
    """Heads of equal length: the older ``tokens`` in groups (``grouped`` is lines x groups), then the ``window``."""

    heads: int
    dim: int
    tokens: int
    window: int
    grouped: tuple[int, int]

    @property
    def numbers(self) -> int:
        """How many numbers are quantized."""
        return self.heads * self.dim * self.tokens

    def sizes(self, bits: int) -> tuple[int, int, int]:
        """Bytes of bounds, numbers and window."""
        bounds = 4 * self.heads * math.prod(self.grouped)
        return bounds, packed_size(self.numbers, bits), 2 * self.heads * self.dim * self.window


def _runs(positions: torch.Tensor) -> list[int]:
    """Lengths of the heads that stand end to end in one row; one length where rows are heads."""
    heads, kept = positions.shape
    if heads != 1:
        return [kept]
    starts = (positions[0].diff() <= 0).nonzero().flatten() + 1
    edges = [0, *starts.tolist(), kept]
    return [stop - start for start, stop in pairwise(edges)]
