"""Visual tokens predicted from those to their left and above, as far as those are coded.

The differential coding of pictures (C. C. Cutler, "Differential Quantization of Communication Signals", US patent
2,605,361; two dimensions as in JPEG's lossless mode), here of a token's coefficients: each from the same coefficient of
its two neighbours, as the decoder has them. Models of the range coder follow from which neighbours are there, never
from a predicted number: both ends read the same symbols, however their processors round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvferry.cache import PromptLayout
from kvferry.codecs.profile import OCTAVE, Prediction
from kvferry.lazy import torch

Index = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


class Lattice:
    """Where the visual tokens of a prompt lie in their pictures; every frame of a video is a picture of its own.

    Tokens of prompts whose grids do not say have no neighbours.

    Attributes
    ----------
    beside : int64 ``[2, n + 1]``
        Of every visual token the one to its left and the one above, counted among visual tokens; ``n`` where there is
        none. The last column stands for none and has none.
    wave : int64 ``[n + 1]``
        Neighbours have a smaller one.
    """

    def __init__(self, layout: PromptLayout) -> None:
        n = int(layout.visual.sum())
        self.beside = np.full((2, n + 1), n)
        self.wave = np.zeros(n + 1, np.int64)
        if any(min(grid) < 1 for grid in layout.grids) or sum(map(math.prod, layout.grids)) != n:
            return
        start = 0
        for frames, rows, columns in layout.grids:
            stop = start + frames * rows * columns
            grid = np.arange(start, stop).reshape(frames, rows, columns)
            left, above = (x[start:stop].reshape(grid.shape) for x in self.beside)
            left[:, :, 1:], above[:, 1:] = grid[:, :, :-1], grid[:, :-1]
            self.wave[start:stop].reshape(grid.shape)[:] = np.arange(rows)[:, None] + np.arange(columns)
            start = stop


class Neighbours:
    """What is known of a stream's visual tokens, in steps, and what that says of the next.

    Parameters
    ----------
    step : int
        In eighths of an octave.
    alive : bool ``[r]``
        The ``a`` coefficients that are coded.

    Attributes
    ----------
    octaves : int64 ``[a, 3]``
        Standard deviations in steps, in eighths of an octave, with the neighbours that :meth:`arrive` says, from 1 on.
    """

    def __init__(self, prediction: Prediction, layout: PromptLayout, step: int, alive: torch.Tensor) -> None:
        self.octaves: Index = prediction.octaves[:, alive].T.numpy().astype(np.int64) - step
        weights = prediction.weights[:, :, alive].double().numpy()
        weights[:, 2] /= 2 ** (step / OCTAVE)
        self._weights = np.concatenate([np.zeros_like(weights[:1]), weights])
        self._lattice = Lattice(layout)
        self._there = np.zeros(len(self._lattice.wave), bool)
        self._known = np.zeros((len(self._there), len(self.octaves)))

    def arrive(self, tokens: Index) -> Index:
        """Which neighbours ``tokens`` have, among themselves and in earlier frames, ``[k]``.

        1 for the one to the left, plus 2 for the one above.
        ``tokens`` are counted among the prompt's visual ones.
        """
        self._there[tokens] = True
        left, above = self._there[self._lattice.beside[:, tokens]].astype(np.int64)
        patterns: Index = left + 2 * above
        return patterns

    def walk(
        self, tokens: Index, patterns: Index, differences: Callable[[Index, Values], npt.NDArray[np.int32]]
    ) -> Values:
        """The coefficients of ``tokens`` as the decoder has them, ``[k, a]``.

        Parameters
        ----------
        differences
            Of some of the tokens (indices into ``tokens``) and what is predicted for them (``[m, a]``), the difference
            in whole steps.
        """
        wave = self._lattice.wave[tokens]
        order = wave.argsort(kind="stable")
        sorted_tokens = tokens[order]
        left, above = self._lattice.beside[:, sorted_tokens]
        by_left, by_above, constant = self._weights.transpose(1, 0, 2)[:, patterns[order]]
        ends = np.flatnonzero(np.diff(wave[order])) + 1
        for start, stop in pairwise([0, *ends.tolist(), len(tokens)]):
            some = slice(start, stop)
            guess = by_left[some] * self._known[left[some]]
            guess += by_above[some] * self._known[above[some]]
            guess += constant[some]
            self._known[sorted_tokens[some]] = guess + differences(order[some], guess)
        return self._known[tokens]
