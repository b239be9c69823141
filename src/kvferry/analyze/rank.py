"""How many directions keys and values use: effective rank and energy ranks, by layer and modality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.analyze.observe import Observation
from kvferry.analyze.running import Array, Reservoir, Running, mean_over
from kvferry.lazy import torch

KINDS = ("keys", "un-rotated keys", "values")
STATS = ("effective", "90 %", "95 %", "99 %")
ENERGIES = (0.90, 0.95, 0.99)
DRAWS = 4
MOST_TOKENS = 256
POOLED_TOKENS = 512


def ranks(matrices: torch.Tensor) -> Array:
    """Ranks of ``[..., m, d]``, float64 ``[4, ...]`` in the order of :data:`STATS`.

    The effective rank is the exponential of the entropy of the singular values divided by their sum (Roy and
    Vetterli, EUSIPCO 2007); an energy rank is the least number of singular values whose squares hold that share of
    all squares. The matrices are taken as they are: no mean is subtracted.
    """
    values = torch.linalg.svdvals(matrices.double())
    tiny = torch.finfo(values.dtype).tiny
    share = values / values.sum(-1, keepdim=True).clamp_min(tiny)
    effective = torch.special.entr(share).sum(-1).exp()
    held = values.square().cumsum(-1)
    total = held[..., -1:].clamp_min(tiny)
    energy = [1 + (held < (level - 1e-12) * total).sum(-1).double() for level in ENERGIES]
    result: Array = torch.stack([effective, *energy]).numpy()
    return result


def token_vectors(seen: Observation) -> torch.Tensor:
    """Keys, un-rotated keys and values with the heads side by side: float32 ``[layers, 3, length, heads * d]``.

    NaN where a layer's rotation cannot be undone.
    """
    cache = seen.cache
    positions = torch.from_numpy(cache.layout.positions[:, : cache.length])
    layers = []
    for layer, rotary in zip(cache, seen.rotary, strict=True):
        keys, values = layer.keys.float().cpu(), layer.values.float().cpu()
        bare = torch.full_like(keys, torch.nan) if rotary is None else rotary.unrotate(keys, positions)
        layers.append(torch.stack([keys, bare, values]))
    return torch.stack(layers).transpose(2, 3).flatten(3)


@dataclass(frozen=True)
class RankResult:
    """Ranks at equal token counts; arrays end in modality (visual, text).

    Parameters
    ----------
    mean, margin : ``[4 stats, layers, 3 kinds, 2]``
        Per prompt, averaged over prompts, and half the width of a 95 % interval.
    pooled : ``[4 stats, layers, 3 kinds, 2]``
        Of one matrix of tokens from many prompts: what a basis shared by all prompts would need.
    samples : ``[n, 3 kinds, 2]``
        Effective rank per prompt, averaged over layers: the claim is about these.
    tokens : float
        Mean number of tokens taken from each modality of a prompt.
    pooled_tokens, draws : int
    """

    mean: Array
    margin: Array
    pooled: Array
    samples: Array
    tokens: float
    pooled_tokens: int
    draws: int = DRAWS


class Rank:
    """Adds up ranks; as many tokens are drawn from the visual ones as from the text, several times, seeded.

    Prompts of one modality count only where all are of one modality.
    """

    def __init__(self, seed: int = 0) -> None:
        self._draw = np.random.default_rng(seed)
        self._both, self._one = _Tally(), _Tally()

    def add(self, seen: Observation) -> None:
        """One prompt."""
        vectors = token_vectors(seen)
        groups = [np.flatnonzero(seen.visual), np.flatnonzero(~seen.visual)]
        count = min(MOST_TOKENS, *(len(g) for g in groups if len(g)))
        tally = self._both if all(len(g) for g in groups) else self._one
        measured = [self._of(vectors, group, count) for group in groups]
        tally.add(np.stack(measured, axis=-1), count)
        for pool, group in zip(tally.pools, groups, strict=True):
            for token in self._draw.permutation(group)[:count]:
                pool.add(vectors[:, :, token].numpy())

    def _of(self, vectors: torch.Tensor, group: npt.NDArray[np.int64], count: int) -> Array:
        """``[4, layers, 3]``, the mean over draws."""
        if not len(group):
            return np.full((len(STATS), *vectors.shape[:2]), np.nan)
        draws = DRAWS if len(group) > count else 1
        found = [_ranks_or_nan(vectors[:, :, self._draw.permutation(group)[:count]]) for _ in range(draws)]
        mean: Array = np.mean(found, axis=0)
        return mean

    def result(self) -> RankResult:
        """What was found so far."""
        tally = self._both if self._both.ranks.count.any() else self._one
        pooled = [pool.rows for pool in tally.pools]
        ranks_of = [_ranks_or_nan(torch.from_numpy(x).movedim(0, 2)) if len(x) else None for x in pooled]
        nothing = np.full(tally.ranks.mean.shape[:-1], np.nan)
        return RankResult(
            mean=tally.ranks.mean,
            margin=tally.ranks.margin,
            pooled=np.stack([nothing if x is None else x for x in ranks_of], axis=-1),
            samples=tally.samples.rows,
            tokens=float(tally.tokens.mean),
            pooled_tokens=max(len(x) for x in pooled),
        )


class _Tally:
    def __init__(self) -> None:
        self.ranks, self.tokens = Running(), Running()
        self.samples = Reservoir()
        self.pools = (Reservoir(POOLED_TOKENS, seed=1), Reservoir(POOLED_TOKENS, seed=2))

    def add(self, measured: Array, count: int) -> None:
        self.ranks.add(measured)
        self.tokens.add(count)
        self.samples.add(mean_over(measured[0], axis=0))


def _ranks_or_nan(matrices: torch.Tensor) -> Array:
    """:func:`ranks` of ``[layers, 3, m, d]``; NaN for a matrix that is not known."""
    known = ~matrices.isnan().flatten(2).any(-1)
    found: Array = np.where(known.numpy(), ranks(matrices.nan_to_num()), np.nan)
    return found
