"""Some tokens of a picture's grid, spread evenly, and which of them are nearest to each of the others.

All by integers, so that both ends find the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvferry.cache import PromptLayout
from kvferry.errors import InputError
from kvferry.lazy import torch

Index = npt.NDArray[np.int64]
NEAREST = 4
"""Kept tokens that a left-out one is rebuilt from."""
PLACE = 2 * NEAREST + 2
"""Numbers that say where a token lies: the way to each of those, and its row and column."""
_BLOCK = 1024


@lru_cache(maxsize=512)
def spread(rows: int, columns: int, count: int) -> Index:
    """``count`` of ``rows * columns`` tokens, ascending: the middle one, then always the one farthest from all so far
    (farthest-point sampling; Y. Eldar et al., 1997), of equals the first."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
    chosen = [rows // 2 * columns + columns // 2]
    far = np.full(rows * columns, 1 << 40, np.int64)
    for _ in range(1, count):
        last = chosen[-1]
        np.minimum(far, (row - row[last]) ** 2 + (column - column[last]) ** 2, out=far)
        chosen.append(int(far.argmax()))
    return np.sort(np.array(chosen, np.int64))


@dataclass(frozen=True, eq=False)
class Plan:
    """How the tokens of one grid are rebuilt from ``count`` of them.

    Parameters
    ----------
    kept, absent : int64 ``[count]``, ``[n - count]``
        Ascending.
    near : int64 ``[absent, NEAREST]``
        Into ``kept``, the nearest first; where there are fewer, the last again.
    shares : float32 ``[absent, NEAREST]``
        By the inverse square of the distance; they sum to 1.
    place : float32 ``[absent, PLACE]``
        Rows and columns to each of those (a fourth as one), and the token's own, -1 to 1.
    """

    kept: torch.Tensor
    absent: torch.Tensor
    near: torch.Tensor
    shares: torch.Tensor
    place: torch.Tensor


@lru_cache(maxsize=512)
def plan(rows: int, columns: int, count: int) -> Plan:
    """See :class:`Plan`; ``count`` tokens of the grid are kept, at least one."""
    kept = spread(rows, columns, count)
    absent = np.setdiff1d(np.arange(rows * columns, dtype=np.int64), kept)
    places = np.stack(np.divmod(np.arange(rows * columns, dtype=np.int64), columns), 1)
    found = [_nearest(places[absent[i : i + _BLOCK]], places[kept]) for i in range(0, len(absent), _BLOCK)]
    near = np.concatenate([np.zeros((0, NEAREST), np.int64), *found])
    way = places[kept][near] - places[absent][:, None]
    weights = 1.0 / np.maximum((way**2).sum(2), 1)
    own = 2 * places[absent] / np.maximum([rows - 1, columns - 1], 1) - 1
    place = np.concatenate([way.reshape(len(absent), 2 * NEAREST) / 4, own], 1)
    tensors = [torch.from_numpy(x) for x in (kept, absent, near)]
    shares = torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()
    return Plan(tensors[0], tensors[1], tensors[2], shares, torch.from_numpy(place).float())


def _nearest(places: Index, kept: Index) -> Index:
    """The nearest of ``kept`` ``[k, 2]`` to each of ``places`` ``[a, 2]``, of equals the first: ``[a, NEAREST]``."""
    distance = ((places[:, None] - kept[None]) ** 2).sum(2) * len(kept) + np.arange(len(kept))
    most = min(NEAREST, len(kept))
    order = np.sort(np.partition(distance, most - 1, axis=1)[:, :most], axis=1) % len(kept)
    return np.concatenate([order, np.repeat(order[:, -1:], NEAREST - most, axis=1)], 1)


@lru_cache(maxsize=64)
def cosines(n: int) -> torch.Tensor:
    """The cosines of length ``n`` (DCT-II), orthonormal columns by rising frequency, float64 ``[n, n]``."""
    angle = torch.arange(n, dtype=torch.float64)[:, None] + 0.5
    waves: torch.Tensor = (angle * torch.arange(n, dtype=torch.float64) * math.pi / n).cos() * (2 / n) ** 0.5
    waves[:, 0] /= 2**0.5
    return waves


def pictures(layout: PromptLayout) -> list[tuple[int, int, Index]]:
    """Rows, columns and prompt indices (``[rows * columns]``) of every picture; each frame of a video is one.

    Raises
    ------
    InputError
        Nothing says how the prompt's visual tokens lie in their pictures.
    """
    visual = np.flatnonzero(layout.visual)
    if sum(map(math.prod, layout.grids)) != len(visual) or any(min(grid) < 1 for grid in layout.grids):
        raise InputError(
            "this model's family does not place its visual tokens on a grid, which a capsule rebuilds them by; choose "
            "another codec, such as int4 or transform"
        )
    found, start = [], 0
    for frames, rows, columns in layout.grids:
        for _ in range(frames):
            found.append((rows, columns, visual[start : start + rows * columns]))
            start += rows * columns
    return found
