"""What a model's caches look like: the profile of the ``transform`` codec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.analyze.source import Asked
from kvferry.codecs.profile import Basis, Prediction, Profile, blockwise, words
from kvferry.errors import InputError
from kvferry.fit.axes import captured, principal_axes
from kvferry.fit.neighbours import fit, neighbourhoods
from kvferry.fit.rows import rows_of, slopes_of
from kvferry.fit.word_means import WordMeans
from kvferry.lazy import torch
from kvferry.recipe import Recipe

if TYPE_CHECKING:
    from kvferry.models import VLM

FLOOR = 0.02
"""Added to the weights, relative to their mean: no direction is free, however little it moved the logits."""
MOST = 8192
"""Vectors of one modality that are kept to find the principal axes: memory does not grow with the questions."""
NEIGHBOURS = 2048
"""Visual tokens that are kept with their neighbours, of what the selection keeps and of whole caches."""


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
        blocks = g.view(len(g), g.shape[1] // dim, dim)
        more = torch.einsum("nbi,nbj->bij", blocks, blocks).double()
        self.total = more if self.total is None else self.total + more
        self.count += len(g)

    @property
    def mean(self) -> torch.Tensor | None:
        """None where there was no vector."""
        return self.total / self.count if self.total is not None and self.count else None


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
        self._word_means = WordMeans()
        self.n = 0

    def add(self, asked: Asked) -> None:
        """Look at one question's cache, and at what its answer depends on.

        Raises
        ------
        InputError
            Keys, values or gradients hold NaN or infinity.
        """
        vlm = self._vlm
        prefilled = vlm.prefill(asked.images, asked.question, context=asked.context, recipe=self._recipe)
        kept = self._recipe.keep(prefilled)
        x, index = rows_of(vlm, kept, asked.name)
        slopes = slopes_of(vlm, prefilled.cache, kept, index, self._probes, self._generator, asked.name)
        visual = kept.layout.visual[index]
        which = words(kept.layout).numpy()[index]
        for kind in (True, False):
            mine = torch.from_numpy(visual == kind)
            self._vectors[kind].add(x[mine], which[visual == kind])
            self._weights[kind].add(slopes[:, mine].flatten(0, 1), vlm.head_dim)
        self._word_means.add(x[torch.from_numpy(~visual)], torch.from_numpy(which[~visual]))
        whole = rows_of(vlm, prefilled.cache, asked.name)
        for reservoir, (rows, at) in zip(self._neighbourhoods, ((x, index), whole), strict=True):
            reservoir.add(*neighbourhoods(rows, at, kept.layout))
        self.n += 1

    def weight(self, visual: bool) -> torch.Tensor:
        """Square root of the mean ``g g^T``, ``[blocks, head_dim, head_dim]``, in units of the visual tokens' mean.

        Where there was no such token all directions weigh alike; without a visual one, in units of the text's mean.
        """
        mean, other = self._weights[visual].mean, self._weights[not visual].mean
        first = other if mean is None else mean if visual or other is None else other
        if first is None:
            raise InputError("calibration needs questions; give it some (--n)")
        scale = float(first.diagonal(dim1=1, dim2=2).mean())
        return root(torch.eye(first.shape[-1]).expand_as(first).double() if mean is None else mean / scale)

    def rows(self, visual: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A sample of the tokens seen, ``[n, p]``, and their words, ``[n]``."""
        reservoir = self._vectors[visual]
        rows = torch.stack(reservoir.rows) if reservoir.rows else torch.zeros(0, self.width)
        return rows, torch.tensor(reservoir.marks, dtype=torch.int64)

    @property
    def width(self) -> int:
        """Numbers of a token's keys and values, ``p``."""
        return 2 * self._vlm.layers * self._vlm.kv_heads * self._vlm.head_dim

    def prediction(self, basis: Basis) -> Prediction | None:
        """Of visual tokens from their neighbours; ``None`` where no two lay beside each other.

        Both what the selection keeps and whole caches count, one as much as the other.
        """
        seen = [x for x in self._neighbourhoods if x.rows]
        return fit(basis, [(torch.stack(x.rows), torch.tensor(x.marks)) for x in seen]) if seen else None

    def profile(self, facts: dict[str, Any]) -> Profile:
        """The profile of all questions so far.

        A modality that no question had gets a basis of no axes, and its tokens are refused when a cache is encoded.
        ``facts`` go into it, with the share of the (weighted) energy that the axes capture, by modality, and how many
        words were seen and have a mean of their own.

        Raises
        ------
        InputError
            There was no question.
        """
        if not self.n:
            raise InputError("calibration needs questions; give it some (--n)")
        (visual, _), (text, which) = self.rows(True), self.rows(False)
        known, means = self._word_means.means(self.width)
        draft = Profile(
            fingerprint=self._vlm.fingerprint,
            visual=no_basis(_mean(visual), self.weight(True)),
            text=no_basis(_mean(text), self.weight(False)),
            words=known,
            word_means=means,
            rotary=self._vlm.rotary,
            shape=(self._vlm.layers, self._vlm.kv_heads, self._vlm.head_dim),
            facts=facts | {"words": {"seen": len(self._word_means.counts), "with_means": len(known)}},
        )
        off = text - draft.means(which, torch.zeros(len(which), dtype=torch.bool))
        bases, shares = {}, {}
        for name, basis, rows in (("visual", draft.visual, visual - draft.visual.mean), ("text", draft.text, off)):
            bases[name] = basis
            if len(rows):
                bases[name] = make_basis(basis.mean, rows, basis.weight, self._rank)
                shares[name] = captured(blockwise(basis.weight, rows), bases[name].vectors)
        facts = draft.facts | {"captured": {name: round(share, 6) for name, share in shares.items()}}
        visual_basis, text_basis = bases["visual"], bases["text"]
        prediction = self.prediction(visual_basis) if visual_basis.octaves.numel() else None
        return replace(draft, visual=visual_basis, text=text_basis, facts=facts, prediction=prediction)


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """Of ``[n, p]``; zeros where ``n`` is 0."""
    return rows.mean(0) if len(rows) else torch.zeros(rows.shape[1])


def no_basis(mean: torch.Tensor, weight: torch.Tensor) -> Basis:
    """A basis of no axes."""
    return Basis(mean, weight, torch.zeros(len(mean), 0), torch.zeros(0, dtype=torch.int16))


def root(blocks: torch.Tensor) -> torch.Tensor:
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
