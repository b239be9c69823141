"""Threshold-filter sparsity: how much of attention is next to nothing, by layer and modality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.analyze.observe import Observation
from kvferry.analyze.running import Array, Reservoir, Running, mean_over
from kvferry.analyze.watch import POST_VISION


@dataclass(frozen=True)
class SparsityResult:
    """Share of visible entries below the threshold, ``[layers, 3 row groups, 2 column modalities]``.

    ``samples`` ``[n, 2]`` holds, per prompt, the mean over layers for the rows after the picture.
    """

    mean: Array
    margin: Array
    samples: Array


class Sparsity:
    """VL-Cache's sparsity (arXiv 2410.23317): the share of causal entries ``A[q, j] < 0.01 max_j A[q, j]``.

    The paper takes the rows after the picture and all columns; here visual and text columns stand apart.
    """

    def __init__(self) -> None:
        self._running, self._samples = Running(), Reservoir()

    def add(self, seen: Observation) -> None:
        """One prompt."""
        visible = np.stack([x.visible for x in seen.attention])
        survived = np.stack([x.survived for x in seen.attention])
        sparse = np.where(visible > 0, 1 - survived / np.maximum(visible, 1), np.nan)
        self._running.add(sparse)
        self._samples.add(mean_over(sparse[:, POST_VISION], axis=0))

    def result(self) -> SparsityResult:
        """What was found so far."""
        return SparsityResult(self._running.mean, self._running.margin, self._samples.rows)
