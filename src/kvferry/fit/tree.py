"""What a model's caches look like, in bases that scale: the profile of the ``transform`` codec for real models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvferry.analyze.source import Asked
from kvferry.cache import PromptLayout
from kvferry.codecs.profile import OCTAVE, blockwise, words
from kvferry.codecs.tree import CLASSES, FIRST, MOST_STARTS, SINKS, VISUAL, Tree, TreeProfile, classes, numbers, starts
from kvferry.errors import InputError
from kvferry.evidence import Prefilled
from kvferry.fit.rows import rows_of, slopes_of
from kvferry.fit.transform import Reservoir, root
from kvferry.fit.word_means import WordMeans
from kvferry.lazy import torch
from kvferry.recipe import Recipe

if TYPE_CHECKING:
    from kvferry.models import VLM

JOINT = 2880
"""Numbers of all layers that the last stage turns together: 16.6 MB of a profile."""
TAKEN = 64
"""Numbers of a block that the second stage turns."""
WORD_NUMBERS = 1024
"""Leading coefficients that a word's mean has."""
WORDS = 4096
PRIOR = 3
"""A word's mean counts as if it had been seen so often besides, as an average token."""
AGAIN = 2
"""A beginning of a prompt that was seen so often is a template's."""
MOST = 24576
"""Rows of each modality that are kept, in float16."""
FINER = 40
COARSER = -24
"""Steps of classes differ by 5 and by 3 octaves at most."""
FAINTEST = 2.0**-20
CHUNK = 1024


class TreeCalibration:
    """Takes questions one by one, then makes the profile.

    Parameters
    ----------
    recipe : Recipe
        Its selection is applied first. All layers and heads must keep the same tokens.
    probes : int
        Random directions of the logits per question, see :func:`kvferry.models.sensitivity.logit_gradients`.
    """

    def __init__(self, vlm: VLM, recipe: Recipe, probes: int, seed: int = 0) -> None:
        self._vlm, self._recipe, self._probes = vlm, recipe, probes
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = {visual: Reservoir(np.random.default_rng((seed, visual)), MOST) for visual in (True, False)}
        self._word_means = WordMeans()
        self._seen: dict[int, int] = {}
        self._starts: dict[int, torch.Tensor] = {}
        shape = len(CLASSES), 2 * vlm.layers * vlm.kv_heads, vlm.head_dim, vlm.head_dim
        self._squares = torch.zeros(shape, dtype=torch.float64)
        self._energy, self._count = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
        self.n = 0

    def add(self, asked: Asked, weigh: bool = True) -> None:
        """Look at one question's cache and, if asked to ``weigh``, at what its answer depends on: the larger part of
        the time.

        Raises
        ------
        InputError
            Keys, values or gradients hold NaN or infinity.
        """
        prefilled = self._vlm.prefill(asked.images, asked.question, context=asked.context, recipe=self._recipe)
        self.take(prefilled, asked.name, weigh)

    def take(self, prefilled: Prefilled, name: str, weigh: bool = True) -> None:
        """As :meth:`add`, of a question that was read already, with the evidence that the recipe's scorer asks for."""
        kept = self._recipe.keep(prefilled)
        (x, index), slopes = rows_of(self._vlm, kept, name), None
        if weigh:
            slopes = slopes_of(self._vlm, prefilled.cache, kept, index, self._probes, self._generator, name)
        self.look(x, slopes, kept.layout, index)

    def look(
        self, x: torch.Tensor, slopes: torch.Tensor | None, layout: PromptLayout, index: npt.NDArray[np.int64]
    ) -> None:
        """One prompt's tokens ``[k, p]``, and gradients ``[probes, k, p]`` with respect to them; they stand at
        ``index`` in the prompt."""
        kinds = classes(layout)[index]
        if slopes is not None:
            self._weigh(slopes, kinds)
        start = np.zeros(len(index), bool)
        for place, digest in enumerate(starts(layout, MOST_STARTS).tolist()):
            count = self._seen[digest] = self._seen.get(digest, 0) + 1
            for at in np.flatnonzero(index == place) if count >= AGAIN else ():
                self._starts.setdefault(digest, x[at].clone())
                start[at] = True
        which = words(layout).numpy()[index]
        for visual in (True, False):
            mine = ((kinds == VISUAL) == visual) & ~start & (index >= SINKS)
            self._rows[visual].add(_halves(x[torch.from_numpy(mine)]), which[mine])
            if not visual:
                self._word_means.add(x[torch.from_numpy(mine)], torch.from_numpy(which[mine]))
        self.n += 1

    def _weigh(self, slopes: torch.Tensor, kinds: npt.NDArray[np.int64]) -> None:
        """Every prompt counts as much as any other, by its tokens behind the sinks."""
        energy = slopes.square().sum(2).mean(0)
        middle = torch.from_numpy(kinds != FIRST)
        scale = float(energy[middle].mean()) if bool(middle.any()) else 0.0
        if not scale > 0:
            return
        blocks, dim = self._squares.shape[1:3]
        for kind in np.unique(kinds):
            mine = torch.from_numpy(kinds == kind)
            self._energy[kind] += float(energy[mine].sum()) / scale
            self._count[kind] += int(mine.sum())
            g = slopes[:, mine].reshape(-1, blocks, dim).transpose(0, 1)
            self._squares[kind] += torch.bmm(g.mT, g).double() / (scale * len(slopes))

    def profile(self, facts: dict[str, Any]) -> TreeProfile:
        """The profile of all questions so far.

        Tokens of a modality that no question had are refused when a cache is encoded. ``facts`` go into it, with what
        part of text's energy the means of words take, and by class of token its share of the gradient's energy and how
        much finer its step is, in eighths of an octave.

        Raises
        ------
        InputError
            There were too few tokens.
        """
        sizes = {visual: len(self._rows[visual].rows) for visual in (True, False)}
        if not any(sizes.values()):
            raise InputError("calibration needs questions; give it some (--n)")
        vlm = self._vlm
        width = 2 * vlm.layers * vlm.kv_heads * vlm.head_dim
        visual = self._tree(self._matrix(True), True) if sizes[True] else None
        text, known, means, taken = None, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1), 0.0
        if sizes[False]:
            rows = self._matrix(False)
            mean = rows.mean(0)
            known, sums, counts = self._word_means.sums(width)
            sums -= counts[:, None] * mean
            off = rows - mean
            before = _energy(off)
            others = self._without_words(off, known, sums, counts)
            taken = 1 - _energy(others) / before if before else 0.0
            text = self._tree(others, False, mean)
            often = counts.argsort(descending=True, stable=True)[:WORDS].sort().values
            known, means = known[often], sums[often] / (counts[often] + PRIOR)[:, None]
            means = text.forward(means.float(), min(WORD_NUMBERS, width))
        digests, steps = sorted(self._starts), self._steps(visual is not None)
        words_ = {"seen": len(self._word_means.counts), "with_means": len(known), "energy": round(taken, 4)}
        return TreeProfile(
            fingerprint=vlm.fingerprint,
            visual=visual,
            text=text,
            words=known,
            word_means=means,
            starts=torch.tensor(digests, dtype=torch.int64),
            start_means=torch.stack([self._starts[x] for x in digests]) if digests else torch.zeros(0, width),
            steps=steps,
            rotary=vlm.rotary,
            shape=(vlm.layers, vlm.kv_heads, vlm.head_dim),
            facts=facts | {"words": words_, "classes": self._by_class(steps)},
        )

    def _matrix(self, visual: bool) -> torch.Tensor:
        """The rows kept of a modality, float32 ``[n, p]``."""
        return torch.stack(self._rows[visual].rows).float()

    def _without_words(
        self, off: torch.Tensor, known: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """What a token differs from its word's mean as all the word's other tokens have it: as a new one would."""
        marks = torch.tensor(self._rows[False].marks)
        at = torch.searchsorted(known, marks).clamp(max=max(len(known) - 1, 0))
        for i in range(len(off)):
            j = int(at[i])
            if len(known) and known[j] == marks[i]:
                off[i] -= (sums[j] - off[i]).float() / (counts[j] - 1 + PRIOR)
        return off

    def _by_class(self, steps: torch.Tensor) -> dict[str, dict[str, float]]:
        """Of those that were there: how much of the gradient's energy is theirs, and how much finer their step is."""
        total = float(self._energy.sum())
        return {
            name: {"energy": round(float(self._energy[kind]) / total, 4), "octaves": int(steps[kind])}
            for kind, name in enumerate(CLASSES)
            if self._energy[kind] > 0
        }

    def _mean_energy(self, kind: int) -> float:
        return float(self._energy[kind] / self._count[kind]) if self._count[kind] else 0.0

    def _steps(self, visual: bool) -> torch.Tensor:
        """Errors of a class that moves the logits more are kept smaller: cost times squared step is the same."""
        first = self._mean_energy(VISUAL if visual else 0)
        every = [self._mean_energy(kind) for kind in range(len(CLASSES))]
        found = [OCTAVE / 2 * np.log2(e / first) if e > 0 and first > 0 else 0.0 for e in every]
        return torch.tensor(np.clip(np.rint(found), COARSER, FINER), dtype=torch.int16)

    def _weight(self, visual: bool) -> torch.Tensor:
        """Square root of the mean ``g g^T``, ``[blocks, head_dim, head_dim]``: every class counts as its tokens do."""
        kinds = [VISUAL] if visual else [kind for kind in range(VISUAL) if kind != FIRST]
        total = torch.zeros_like(self._squares[0])
        for kind in kinds:
            if (energy := self._mean_energy(kind)) > 0:
                total += self._squares[kind] / energy
        scale = float(total.diagonal(dim1=1, dim2=2).mean())
        return root(total / scale if scale else torch.eye(total.shape[-1]).expand_as(total).double())

    def _tree(self, off: torch.Tensor, visual: bool, mean: torch.Tensor | None = None) -> Tree:
        if mean is None:
            mean = off.mean(0)
            off -= mean
        return make_tree(mean, off, self._weight(visual), self._vlm.layers)


def tree_bytes(layers: int, heads: int, dim: int) -> int:
    """Bytes of the two bases in a profile for caches of this shape, by formula: pictures and text."""
    taken = min(dim, TAKEN)
    lead = min(2 * heads * taken, JOINT // layers)
    width = 2 * layers * heads * dim
    return 2 * (2 * numbers(layers, heads, dim, taken, lead) + 4 * width)


def make_tree(mean: torch.Tensor, off: torch.Tensor, weight: torch.Tensor, layers: int) -> Tree:
    """Principal axes stage by stage, of rows ``off`` (``[n, p]``, about 0), which are lost.

    Fewer rows turn fewer numbers together: half as many as there are rows at most.
    """
    blocks, d, _ = weight.shape
    each, n = blocks // layers, len(off)
    taken = max(1, min(d, TAKEN, n // (2 * each)))
    lead = max(1, min(each * taken, JOINT // layers, n // (2 * layers)))
    for rows in _chunks(off):
        rows.copy_(blockwise(weight, rows))
    leaves = torch.empty_like(weight)
    parts = torch.arange(blocks * d).view(blocks, d)
    for block, part in enumerate(parts):
        leaves[block] = weight[block] @ _turn(off, part)
    groups = parts.view(layers, each, d)[:, :, :taken].reshape(layers, -1)
    stage = torch.stack([_turn(off, group) for group in groups])
    top = groups[:, :lead].flatten()
    joint = _turn(off, top)
    variance = sum(rows.square().sum(0).double() for rows in _chunks(off)) / max(n, 1)
    rest = torch.cat([top, groups[:, lead:].flatten(), parts[:, taken:].flatten()])
    deviation = torch.as_tensor(variance)[rest].sqrt().clamp(min=FAINTEST)
    return Tree(mean, leaves, stage, joint, (OCTAVE * deviation.log2()).round().to(torch.int16))


def _chunks(off: torch.Tensor) -> list[torch.Tensor]:
    """Views of some rows at a time."""
    return [off[start : start + CHUNK] for start in range(0, len(off), CHUNK)]


def _turn(off: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Principal axes of the columns ``part``, by falling deviation, ``[m, m]``; ``off`` gets its columns along them."""
    total = torch.zeros(len(part), len(part), dtype=torch.float64)
    for rows in _chunks(off):
        some = rows[:, part]
        total += (some.T @ some).double()
    axes: torch.Tensor = torch.linalg.eigh(total).eigenvectors.flip(1).float()
    for rows in _chunks(off):
        rows[:, part] = rows[:, part] @ axes
    return axes


def _energy(off: torch.Tensor) -> float:
    return sum(float(rows.square().sum(dtype=torch.float64)) for rows in _chunks(off))


def _halves(x: torch.Tensor) -> Iterable[torch.Tensor]:
    return (row.clamp(-65504, 65504).half() for row in x)
