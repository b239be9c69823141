"""Principal axes of many vectors, by whichever of the two Gram matrices is the smaller one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvferry.codecs.profile import OCTAVE

CHUNK = 1024
"""Rows or columns that are in float64 at a time."""
FAINTEST = 2.0**-20
"""No standard deviation is counted below this."""


def principal_axes(y: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Axes ``[p, r]`` of rows ``y`` (``[n, p]``, about 0), and their standard deviations in eighths of an octave.

    ``r`` is ``rank``, or ``n`` or ``p`` where that is less. Eigenvectors of ``y^T y``; where there are fewer rows than
    columns of ``y y^T``, turned into axes by ``y^T``, which takes a small part of a singular value decomposition's
    time. In float64, so that axes of ``1e-7`` of the largest deviation are still exact to float32; what is fainter is
    orthonormal all the same.
    """
    n, p = y.shape
    rank = min(rank, n, p)
    if n >= p:
        axes = _leading(_gram(y), rank).float()
    else:
        turned = _leading(_gram(y.T), rank)
        axes = torch.cat([part.double() @ turned for part in _chunks(y.T)])
        axes /= axes.norm(dim=0).clamp(min=1e-300)
        axes = torch.linalg.qr(axes).Q.float()
    deviation = (y @ axes).pow(2).mean(0).sqrt().clamp(min=FAINTEST)
    return axes, (OCTAVE * deviation.log2()).round().to(torch.int16)


def captured(y: torch.Tensor, axes: torch.Tensor) -> float:
    """The share of the sum of squares of ``y`` (``[n, p]``) that lies along ``axes`` (``[p, r]``); 1 where it is 0."""
    energy = sum(float(part.double().square().sum()) for part in _chunks(y))
    along = sum(float((part @ axes).double().square().sum()) for part in _chunks(y))
    return min(along / energy, 1.0) if energy else 1.0


def _gram(tall: torch.Tensor) -> torch.Tensor:
    """``tall^T tall`` in float64, without a float64 copy of ``tall``."""
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for part in _chunks(tall):
        wide = part.double()
        total += wide.T @ wide
    return total


def _leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors by falling eigenvalue, the first ``rank`` of them."""
    _, vectors = torch.linalg.eigh(gram)
    leading: torch.Tensor = vectors.flip(1)[:, :rank]
    return leading


def _chunks(x: torch.Tensor) -> Iterator[torch.Tensor]:
    return (x[start : start + CHUNK] for start in range(0, len(x), CHUNK))
