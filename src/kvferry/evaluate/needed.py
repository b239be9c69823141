"""How many bytes a method needs for a share of the full cache's accuracy, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.evaluate.stats import RESAMPLES, Estimate, resampled_means

Floats = npt.NDArray[np.float64]


def bytes_needed(
    sizes: Sequence[float],
    correct: npt.ArrayLike,
    full_size: float,
    full_correct: npt.ArrayLike,
    share: float,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Fewest mean bytes at which a method reaches ``share`` of the full cache's accuracy.

    Between two measured sizes accuracy is taken to be linear in the logarithm of the bytes; from the largest measured
    size on to the full cache too. Questions are resampled for the interval, the same for method and ceiling (paired).
    Where even the full cache's own accuracy is not enough the answer is infinite.

    Parameters
    ----------
    sizes : ``[points]``
        Mean bytes of the method at every measured point, in any order.
    correct : ``[points, n]``
        Whether every question was answered rightly there.
    full_size, full_correct : float, ``[n]``
        The ceiling's.
    share : float
        For instance 0.98.
    """
    right = np.concatenate([np.asarray(correct, np.float64), np.asarray(full_correct, np.float64)[None]])
    if right.shape[0] != len(sizes) + 1 or right.shape[1] == 0 or not 0 < share <= 1:
        raise InputError("bytes_needed takes one row of answers per size, at least one question, a share in (0, 1]")
    order = np.argsort([*sizes, full_size], kind="stable")
    logs = np.log(np.asarray([*sizes, full_size], np.float64)[order])
    means = np.concatenate([right.mean(axis=1, keepdims=True), resampled_means(right, resamples)], axis=1)
    target = share * means[-1]
    found = np.exp(_first_reach(logs, means[order], target))
    low, high = np.percentile(found[1:], [2.5, 97.5])
    return Estimate(float(found[0]), float(low), float(high), right.shape[1])


def _first_reach(x: Floats, y: Floats, target: Floats) -> Floats:
    """Where rising ``x`` ``[points]`` first brings the broken line ``y`` ``[points, draws]`` up to ``target``."""
    reached = y >= target
    first = reached.argmax(axis=0)
    draws = np.arange(y.shape[1])
    before = np.maximum(first - 1, 0)
    rise = np.where(first > 0, y[first, draws] - y[before, draws], 1.0)
    part = np.where(first > 0, (y[first, draws] - target) / np.maximum(rise, 1e-12), 0.0)
    where = x[first] - part * (x[first] - x[before])
    result: Floats = np.where(reached.any(axis=0), where, np.inf)
    return result
