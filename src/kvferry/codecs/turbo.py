"""TurboQuant: a random rotation, then the best scalar quantizer for what it makes of any vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvferry.codecs.base import LIMIT, Shape
from kvferry.codecs.packing import Bytes, pack, packed_size, unpack
from kvferry.codecs.side import Sided, What, finite, from_words, to_words
from kvferry.errors import InputError
from kvferry.lazy import torch

_SEED = 20250419
_POINTS, _ROUNDS = 1 << 15, 3000


@dataclass(frozen=True)
class Turbo(Sided):
    """A token's vector, rotated at random, looks like a point drawn evenly from a sphere: each coordinate is rounded
    to the Lloyd-Max codebook of that distribution, and the vector's length is kept in bfloat16.

    A. Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate" (arXiv 2504.19874),
    Algorithm 1 (least squared error). Nothing is calibrated, and both ends derive rotation and codebook. The squared
    error over the squared length is .36, .117, .034 and .0095 on average at 1 to 4 bits.

    Deviations: the rotation is a randomized Hadamard transform (see :func:`rotate`), not a dense random matrix. A width
    of 2.5 bits gives half of the channels 3 bits and half 2; the paper gives more bits to channels it calls outliers,
    which a rotation over all channels does not leave. The unbiased variant (Algorithm 2, one bit of the residual's
    sign) is left out.

    Bytes of keys, then of values: root mean squares (``[kv_heads, kept]``, high bytes, then low bytes: a length would
    overflow), the packed lower channels (rounded up half), the packed upper channels (``[kv_heads, channels, kept]``).

    Parameters
    ----------
    bits : float
        1 to 8 in halves.
    """

    bits: float = 3.5
    name: ClassVar[str] = "turbo"
    argument: ClassVar[str] = "bits"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or not float(2 * self.bits).is_integer():
            raise InputError(f"turbo:{self.bits:g} does not exist; choose turbo:1 to turbo:8 in steps of 0.5")

    def encode_side(self, layer: int, what: What, tensor: torch.Tensor, positions: torch.Tensor) -> bytes:
        """See :class:`~kvferry.codecs.side.Side`."""
        numbers = finite(layer, what, tensor).cpu()
        heads, kept, dim = numbers.shape
        sizes, turned = torch.empty(heads, kept), np.empty((heads, dim, kept), np.float32)
        for head, by_token in enumerate(numbers):
            by_channel = by_token.T.contiguous()
            peak = by_channel.abs().amax(0)
            relative = by_channel / torch.where(peak > 0, peak, 1.0)
            size = relative.double().square_().mean(0).sqrt_().float()  # the same in any order
            sizes[head] = peak * size
            turned[head] = rotate(relative / torch.where(size > 0, size, 1.0)).numpy()
        parts = [to_words(sizes)]
        for channels, bits in self._widths(dim):
            levels = _nearest(turned[:, channels], codebook(dim, bits))
            parts.append(pack(levels.reshape(-1), bits).tobytes())
        return b"".join(parts)

    def side_size(self, what: What, shape: Shape, positions: torch.Tensor) -> int:
        """Two bytes a vector, and the packed numbers."""
        heads, kept, dim = shape
        counts = (packed_size(heads * kept * len(range(dim)[where]), bits) for where, bits in self._widths(dim))
        return 2 * heads * kept + sum(counts)

    def decode_side(self, what: What, octets: Bytes, shape: Shape, positions: torch.Tensor) -> torch.Tensor:
        """See :class:`~kvferry.codecs.side.Side`."""
        heads, kept, dim = shape
        size, octets = from_words(octets[: 2 * heads * kept]).reshape(heads, kept, 1), octets[2 * heads * kept :]
        turned = np.empty((heads, dim, kept), np.float32)
        for channels, bits in self._widths(dim):
            width = len(range(dim)[channels])
            stop = packed_size(heads * kept * width, bits)
            levels = unpack(octets[:stop], bits, heads * kept * width).reshape(heads, width, kept)
            turned[:, channels] = np.take(codebook(dim, bits), levels)
            octets = octets[stop:]
        out = torch.empty(shape, dtype=torch.bfloat16)
        for head, by_channel in enumerate(torch.from_numpy(turned)):
            out[head] = rotate(by_channel, back=True).mul_(size[head].T).clamp_(-LIMIT, LIMIT).T
        return out

    def _widths(self, dim: int) -> tuple[tuple[slice, int], ...]:
        """Channels and their bits: all alike, or half and half."""
        low, high = math.floor(self.bits), math.ceil(self.bits)
        half = dim if low == high else -(-dim // 2)
        return (slice(0, half), low), (slice(half, dim), high)


def rotate(vectors: torch.Tensor, back: bool = False) -> torch.Tensor:
    """``vectors`` (float32 ``[dim, n]``, one a column) under a fixed random rotation, or under its inverse.

    Random signs, then a Hadamard transform, twice: after one, a vector with a single large channel has coordinates of
    equal size, far from the distribution that the codebook is for (its squared error at 2 bits was .25, not .117).
    Where ``dim`` is no power of two, the largest one below it is used three times: on the first channels, on the last
    ones, and on the first ones again. Signs come from Philox's raw bits, and the transform adds and subtracts in a
    fixed order, so that every machine gets the same numbers.
    """
    dim = len(vectors)
    power = 1 << (dim.bit_length() - 1)
    starts = (0, 0) if power == dim else (0, dim - power, 0)
    steps = list(zip(starts, _signs(len(starts), power), strict=True))
    out = vectors.clone()
    for start, signs in reversed(steps) if back else steps:
        block = out[start : start + power]
        block.copy_(_hadamard(block).mul_(signs) if back else _hadamard(block * signs))
    return out


@lru_cache(maxsize=64)
def codebook(dim: int, bits: int) -> npt.NDArray[np.float32]:
    """The ``2**bits`` Lloyd-Max levels for one coordinate of a random vector of length ``sqrt(dim)``, ascending.

    Such a coordinate is ``sqrt(dim) * sin(a)`` with a density of ``cos(a)**(dim - 2)`` (Lemma 1 of the paper, where it
    is written as a Beta distribution). The angle is cut into small cells and Lloyd's two steps take turns a fixed
    number of times. Levels are rounded to multiples of 2^-16: libraries that differ in a last digit still agree.
    """
    count = 1 << bits
    if dim == 1:
        return np.linspace(-1, 1, count, dtype=np.float32)
    widest = min(math.pi / 2, 12 / math.sqrt(dim))
    edges = np.linspace(-widest, widest, _POINTS + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    weight = np.cos(middle) ** (dim - 2)
    values = math.sqrt(dim) * np.sin(middle)
    mass = np.concatenate([[0.0], np.cumsum(weight)])
    moment = np.concatenate([[0.0], np.cumsum(weight * values)])
    ends = math.sqrt(dim) * np.sin(edges)
    spread = np.cumsum(weight ** (1 / 3))
    levels = np.interp((np.arange(count) + 0.5) / count * spread[-1], spread, values)
    for _ in range(_ROUNDS):
        cuts = np.concatenate([[ends[0]], (levels[1:] + levels[:-1]) / 2, [ends[-1]]])
        levels = np.diff(np.interp(cuts, ends, moment)) / np.diff(np.interp(cuts, ends, mass))
    levels = (levels - levels[::-1]) / 2
    return np.asarray(np.round(levels * 2**16) / 2**16, np.float32)


@lru_cache(maxsize=64)
def _signs(count: int, power: int) -> torch.Tensor:
    """``[count, power, 1]`` of 1 and -1."""
    raw = np.random.Philox(key=_SEED).random_raw(-(-count * power // 64)).astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8), count=count * power, bitorder="little")
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).reshape(count, power, 1)


def _hadamard(vectors: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of the columns of ``[power of two, n]``."""
    power, n = vectors.shape
    now, after = vectors.clone(), torch.empty_like(vectors)
    half = 1
    while half < power:
        pairs, out = (x.view(power // (2 * half), 2, half, n) for x in (now, after))
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        now, after = after, now
        half *= 2
    return now.mul_(power**-0.5)


def _nearest(numbers: npt.NDArray[np.float32], book: npt.NDArray[np.float32]) -> Bytes:
    """Index of the nearest level, by a binary search for all numbers at once (much faster than ``searchsorted``)."""
    cuts = (book[1:] + book[:-1]) / 2
    levels = np.zeros(numbers.shape, np.intp)
    step = len(book) // 2
    while step:
        levels += (numbers > np.take(cuts, levels + (step - 1))) * step
        step //= 2
    return levels.astype(np.uint8)
