"""What a model's caches look like: the profile of the ``transform`` codec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.analyze.source import Asked
from kvferry.cache import KVCache
from kvferry.codecs import stack
from kvferry.codecs.profile import OCTAVE, Basis, Prediction, Profile, blockwise, to_rows, words
from kvferry.errors import InputError
from kvferry.fit.neighbours import fit, neighbourhoods
from kvferry.recipe import Recipe

if TYPE_CHECKING:
    from kvferry.models import VLM

ENOUGH = 8
"""A word that was seen so often gets a mean of its own."""
FLOOR = 0.02
"""Added to the weights, relative to their mean: no direction is free, however little it moved the logits."""
MOST = 8192
"""Vectors of one modality that are kept to find the principal axes: memory does not grow with the questions."""
NEIGHBOURS = 2048
"""Visual tokens that are kept with their neighbours, of what the selection keeps and of whole caches."""
TOKENS_OF_ANSWER = 16


@dataclass
class Reservoir:
    """A uniform sample of at most ``most`` (:data:`MOST`) rows of a stream (Algorithm R)."""

    generator: np.random.Generator
    most: int | None = None
    rows: list[torch.Tensor] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    seen: int = 0

    def add(self, x: Iterable[torch.Tensor], marks: np.ndarray[Any, Any]) -> None:
        most = self.most or MOST
        for row, mark in zip(x, marks.tolist(), strict=True):
            self.seen += 1
            if len(self.rows) < most:
                self.rows.append(row.clone())
                self.marks.append(mark)
            elif (at := int(self.generator.integers(self.seen))) < most:
                self.rows[at], self.marks[at] = row.clone(), mark


@dataclass
class _Weights:
    """Mean of ``g g^T``, block by block."""

    total: torch.Tensor | None = None
    count: int = 0

    def add(self, g: torch.Tensor, dim: int) -> None:
        blocks = g.view(len(g), -1, dim)
        more = torch.einsum("nbi,nbj->bij", blocks, blocks).double()
        self.total = more if self.total is None else self.total + more
        self.count += len(g)

    @property
    def mean(self) -> torch.Tensor:
        if self.total is None:
            raise InputError("calibration needs questions with pictures as well as text; give it more (--n)")
        return self.total / self.count


class Calibration:
    """Takes questions one by one, then makes the profile.

    Parameters
    ----------
    recipe : Recipe
        Its selection is applied first, so that the statistics are those of the traffic. All layers and heads must keep
        the same tokens.
    rank : int
        Coefficients of a token at most.
    probes : int
        Random directions of the logits per question, see :func:`kvferry.models.sensitivity.logit_gradients`.
    """

    def __init__(self, vlm: VLM, recipe: Recipe, rank: int, probes: int, seed: int = 0) -> None:
        self._vlm, self._recipe, self._rank, self._probes = vlm, recipe, rank, probes
        self._generator = torch.Generator().manual_seed(seed)
        numbers = np.random.default_rng(seed)
        self._vectors = {visual: Reservoir(numbers) for visual in (True, False)}
        self._weights = {visual: _Weights() for visual in (True, False)}
        self._neighbourhoods = [Reservoir(np.random.default_rng((seed, i)), NEIGHBOURS) for i in range(2)]
        self._by_word: dict[int, tuple[int, torch.Tensor]] = {}
        self.n = 0

    def add(self, asked: Asked) -> None:
        """Look at one question's cache, and at what its answer depends on."""
        from kvferry.models.sensitivity import logit_gradients

        vlm = self._vlm
        prefilled = vlm.prefill(asked.images, asked.question, recipe=self._recipe)
        kept = self._recipe.keep(prefilled)
        answer = vlm.resume(prefilled.cache, max_new_tokens=TOKENS_OF_ANSWER).token_ids
        gradients = logit_gradients(vlm, kept, answer, self._probes, self._generator)
        x, index = self._rows_of(kept)
        visual = kept.layout.visual[index]
        where = torch.from_numpy(kept.layout.positions[:, index].astype(np.int64))
        slopes = torch.stack([to_rows(vlm.rotary, k.cpu(), v.cpu(), where) for k, v in zip(*gradients, strict=True)])
        which = words(kept.layout).numpy()[index]
        for kind in (True, False):
            mine = torch.from_numpy(visual == kind)
            self._vectors[kind].add(x[mine], which[visual == kind])
            self._weights[kind].add(slopes[:, mine].flatten(0, 1), vlm.head_dim)
        for row, word in zip(x[torch.from_numpy(~visual)], which[~visual].tolist(), strict=True):
            count, total = self._by_word.get(word, (0, torch.zeros_like(row, dtype=torch.float64)))
            self._by_word[word] = (count + 1, total + row)
        for reservoir, (rows, at) in zip(
            self._neighbourhoods, ((x, index), self._rows_of(prefilled.cache)), strict=True
        ):
            reservoir.add(*neighbourhoods(rows, at, kept.layout))
        self.n += 1

    def _rows_of(self, cache: KVCache) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
        """One row per token, ``[k, p]``, and where it stands in the prompt, ``[k]``."""
        keys, values, index = stack(cache.layers)
        where = torch.from_numpy(cache.layout.positions[:, index.cpu().numpy()].astype(np.int64))
        return to_rows(self._vlm.rotary, keys.cpu(), values.cpu(), where), index.cpu().numpy()

    def weight(self, visual: bool) -> torch.Tensor:
        """Square root of the mean ``g g^T``, ``[blocks, head_dim, head_dim]``, in units of the visual tokens' mean.

        Raises
        ------
        InputError
            There was no such token.
        """
        scale = float(self._weights[True].mean.diagonal(dim1=1, dim2=2).mean())
        return _root(self._weights[visual].mean / scale)

    def rows(self, visual: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A sample of the tokens seen, ``[n, p]``, and their words, ``[n]``."""
        reservoir = self._vectors[visual]
        return torch.stack(reservoir.rows), torch.tensor(reservoir.marks)

    def word_means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frequent words, ascending, and their means: the fields of the profile."""
        known = sorted(word for word, (count, _) in self._by_word.items() if count >= ENOUGH)
        means = [(self._by_word[word][1] / self._by_word[word][0]).float() for word in known]
        p = self._vectors[True].rows[0].shape[0]
        return torch.tensor(known, dtype=torch.int64), torch.stack(means) if means else torch.zeros(0, p)

    def prediction(self, basis: Basis) -> Prediction | None:
        """Of visual tokens from their neighbours; ``None`` where no two lay beside each other.

        Both what the selection keeps and whole caches count, one as much as the other.
        """
        seen = [x for x in self._neighbourhoods if x.rows]
        return fit(basis, [(torch.stack(x.rows), torch.tensor(x.marks)) for x in seen]) if seen else None

    def profile(self, facts: dict[str, Any]) -> Profile:
        """The profile of all questions so far.

        Raises
        ------
        InputError
            There was no visual token, or no text.
        """
        weights = {visual: self.weight(visual) for visual in (True, False)}
        (visual, _), (text, which) = self.rows(True), self.rows(False)
        known, means = self.word_means()
        draft = Profile(
            fingerprint=self._vlm.fingerprint,
            visual=make_basis(visual.mean(0), visual - visual.mean(0), weights[True], self._rank),
            text=make_basis(text.mean(0), text - text.mean(0), weights[False], self._rank),
            words=known,
            word_means=means,
            rotary=self._vlm.rotary,
            shape=(self._vlm.layers, self._vlm.kv_heads, self._vlm.head_dim),
            facts=facts,
        )
        off = text - draft.means(which, torch.zeros(len(which), dtype=torch.bool))
        text_basis = make_basis(text.mean(0), off, weights[False], self._rank)
        return replace(draft, text=text_basis, prediction=self.prediction(draft.visual))


def _root(blocks: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of each block, after adding :data:`FLOOR` of the mean diagonal."""
    dim = blocks.shape[-1]
    floor = FLOOR * blocks.diagonal(dim1=1, dim2=2).mean()
    blocks = blocks + floor * torch.eye(dim, dtype=blocks.dtype)
    values, vectors = torch.linalg.eigh(blocks)
    root: torch.Tensor = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    return root.float()


def make_basis(mean: torch.Tensor, off: torch.Tensor, weight: torch.Tensor, rank: int) -> Basis:
    """Principal axes of ``off`` (``[n, p]``: rows less what is expected of them) in the weighted space."""
    return Basis(mean, weight, *principal_axes(blockwise(weight, off), rank))


def principal_axes(y: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Axes ``[p, r]`` of rows ``y`` (``[n, p]``, about 0), and their standard deviations in eighths of an octave."""
    rank = min(rank, *y.shape)
    if y.shape[0] >= y.shape[1]:
        _, axes = torch.linalg.eigh(y.T.double() @ y.double())
        axes = axes.flip(1)[:, :rank].float()
    else:
        axes = torch.linalg.svd(y, full_matrices=False).Vh[:rank].T.contiguous()
    deviation = (y @ axes).pow(2).mean(0).sqrt().clamp(min=2.0**-20)
    return axes, (OCTAVE * deviation.log2()).round().to(torch.int16)
