"""Groups of coefficients that share a scale and a shift: which, how wide, and their numbers."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

from kvferry.codecs.packing import Bytes, pack, packed_size, unpack
from kvferry.lazy import torch

Width = Literal[2, 4, 8]
SIZES = (1, 16, 64, 256, 1024)
ERROR: dict[Width, float] = {2: 0.119, 4: 0.0116, 8: 0.0006}
"""Squared error over the variance: of 4 and of 16 even levels on a Gaussian, and of e4m3."""
BOUNDS = 32
"""Bits of a group's scale and shift."""
UNITS = 8192
_SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_QUARTERS = np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])
"""``2 ** (i / 4)``, as numbers that no library computes in its own way."""


class Group(NamedTuple):
    """Axes ``start`` to ``stop`` in ``width`` bits each (8: FP8)."""

    start: int
    stop: int
    width: Width

    @property
    def span(self) -> slice:
        """The axes as an index."""
        return slice(self.start, self.stop)

    def size(self, tokens: int) -> int:
        """Bytes of the numbers."""
        return packed_size((self.stop - self.start) * tokens, self.width)


@lru_cache(maxsize=512)
def plan(octaves: tuple[int, ...], tokens: int, bits: int) -> tuple[Group, ...]:
    """The groups that make the expected squared error least; axes in none of them are not coded.

    Exact where ``bits`` is at most 8192; above, every group's cost is rounded up to a multiple of ``bits / 8192``. Sums
    and products of float64 in a fixed order only: both ends get the same groups.

    Parameters
    ----------
    octaves : tuple of int
        Standard deviations by falling size, in eighths of an octave.
    tokens : int
        How many share a group's 32 bits of scale and shift.
    bits : int
        The budget for all tokens together.
    """
    exponents = np.array(octaves, np.int64)
    variance = np.ldexp(_QUARTERS[exponents & 3], exponents >> 2)
    unit = max(1, -(-bits // UNITS))
    room, count = bits // unit, len(octaves)
    before = np.concatenate([[0.0], np.cumsum(variance)])
    least = np.zeros((count + 1, room + 1))
    choice = np.zeros((count, room + 1), np.int8)
    ways = list(product(SIZES, ERROR))
    for i in range(count - 1, -1, -1):
        least[i] = least[i + 1] + variance[i]
        for number, (size, width) in enumerate(ways, 1):
            cost = -(-(tokens * size * width + BOUNDS) // unit)
            if i + size > count or cost > room:
                continue
            spread = before[i + size] - before[i] if width == 8 else size * variance[i]
            error = least[i + size, : room + 1 - cost] + ERROR[width] * spread
            better = error < least[i, cost:]
            least[i, cost:][better] = error[better]
            choice[i, cost:][better] = number
    groups, at = [], 0
    while at < count:
        if not (number := int(choice[at, room])):
            at += 1
            continue
        size, width = ways[number - 1]
        groups.append(Group(at, at + size, width))
        room -= -(-(tokens * size * width + BOUNDS) // unit)
        at += size
    return tuple(groups)


def quantize(numbers: torch.Tensor, width: Width) -> tuple[torch.Tensor, torch.Tensor, Bytes]:
    """Shift, scale and packed numbers of a group, ``[axes, tokens]``."""
    mean = numbers.mean()
    if width == 8:
        shift = mean.bfloat16().float()
        scale = ((numbers - shift).abs().max() / torch.finfo(torch.float8_e4m3fn).max).bfloat16().float()
        ratio = ((numbers - shift) / torch.where(scale > 0, scale, 1.0)).clamp(-448, 448)
        return shift, scale, ratio.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(-1)
    best = None
    for shrink in _SHRINK:
        low = (mean + (numbers.min() - mean) * shrink).bfloat16().float()
        scale = (((numbers.max() - mean) * shrink + mean - low) / (2**width - 1)).clamp(min=0).bfloat16().float()
        levels = ((numbers - low) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 2**width - 1)
        error = float((low + scale * levels - numbers).double().square().sum())
        if best is None or error < best[0]:
            best = error, low, scale, levels
    _, low, scale, levels = best or (0.0, mean, mean, numbers)
    return low, scale, pack(levels.to(torch.uint8).numpy().reshape(-1), width)


def dequantize(octets: Bytes, width: Width, count: int) -> torch.Tensor:
    """What a shift is added to, after it is scaled; float32 ``[count]``."""
    if width == 8:
        return torch.from_numpy(octets.copy()).view(torch.float8_e4m3fn).float()
    return torch.from_numpy(unpack(octets, width, count).astype(np.float32))
