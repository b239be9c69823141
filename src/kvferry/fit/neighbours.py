"""How a visual token's coefficients follow from those of its neighbours: the prediction in a profile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvferry.cache import PromptLayout
from kvferry.codecs.neighbours import Lattice
from kvferry.codecs.profile import OCTAVE, Basis, Prediction
from kvferry.lazy import torch

BOUND = 0.999
"""What the two weights' magnitudes add up to at most, so that no error grows from token to token."""
RIDGE = 1e-6
"""Added to the normal equations, relative to their mean: no weight hangs on a coefficient that is always the same."""

Patterns = npt.NDArray[np.int64]


def neighbourhoods(
    x: torch.Tensor, index: npt.NDArray[np.int64], layout: PromptLayout
) -> tuple[Iterator[torch.Tensor], Patterns]:
    """Visual tokens that have a neighbour: each with the one to its left and the one above (``[3, p]``, zeros for one
    that is not there), and which there are, as :meth:`kvferry.codecs.neighbours.Neighbours.arrive` says.

    Parameters
    ----------
    x : ``[k, p]``
    index : int64 ``[k]``
        Where those tokens stand in the prompt; text is left out.
    """
    visual = layout.visual[index]
    lattice = Lattice(layout)
    tokens = (layout.visual.cumsum() - 1)[index[visual]]
    row = np.full(len(lattice.wave), len(x))
    row[tokens] = np.flatnonzero(visual)
    beside = row[lattice.beside[:, tokens]]
    left, above = beside < len(x)
    patterns = left + 2 * above
    padded = torch.cat([x, torch.zeros_like(x[:1])])
    some = np.stack([row[tokens], *beside], 1)[patterns > 0]
    return (padded[torch.from_numpy(each)] for each in some), patterns[patterns > 0]


def fit(basis: Basis, samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Prediction:
    """Least squares, for each coefficient and each set of neighbours.

    Parameters
    ----------
    samples : sequence of (``[n, 3, p]``, int64 ``[n]``)
        Of :func:`neighbourhoods`. Each sample as a whole weighs the same, however large it is. Whoever has both
        neighbours counts where one is asked for, too.
    """
    rank = len(basis.octaves)
    coefficients = [_coefficients(basis, x) for x, _ in samples]
    weights, octaves = torch.zeros(3, 3, rank), basis.octaves.repeat(3, 1)
    for pattern in (1, 2, 3):
        mine = [marks & pattern == pattern for _, marks in samples]
        share = torch.cat([torch.full((int(m.sum()),), 1 / len(m)) for m in mine]).double()
        if not len(share):
            continue
        share /= share.sum()
        c = torch.cat([c[m] for c, m in zip(coefficients, mine, strict=True)])
        c[:, 1:] *= torch.tensor([pattern & 1, pattern >> 1])[:, None]
        weights[pattern - 1], deviation = _least_squares(c, share)
        octaves[pattern - 1] = (OCTAVE * deviation.clamp(min=2.0**-20).log2()).round().to(torch.int16)
    return Prediction(weights, octaves)


def _coefficients(basis: Basis, x: torch.Tensor) -> torch.Tensor:
    """Of tokens and their neighbours, float64 ``[n, 3, r]``."""
    return basis.forward(x.flatten(0, 1) - basis.mean).view(len(x), 3, -1).double()


def _least_squares(c: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[3, r]`` and the deviation from what they predict ``[r]``; ``share`` is each row's weight, ``[n]``."""
    mean = (share[:, None, None] * c).sum(0)
    y, left, above = (c - mean).unbind(1)
    both = torch.stack([left, above], 2)
    squares = torch.einsum("n,nri,nrj->rij", share, both, both)
    ridge = RIDGE * squares.diagonal(dim1=1, dim2=2).mean(1) + 2.0**-60
    squares += ridge[:, None, None] * torch.eye(2)
    weights = torch.linalg.solve(squares, torch.einsum("n,nri,nr->ri", share, both, y)).T
    weights *= (BOUND / weights.abs().sum(0)).clamp(max=1)
    constant = mean[0] - weights[0] * mean[1] - weights[1] * mean[2]
    left_over = y - weights[0] * left - weights[1] * above
    return torch.cat([weights, constant[None]]).float(), (share[:, None] * left_over.square()).sum(0).sqrt()
