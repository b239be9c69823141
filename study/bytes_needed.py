"""How many bytes a method needs for a share of the full cache's accuracy, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.statistics import RESAMPLES, Estimate, estimate_of, means_with_draws

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
    means = means_with_draws(right, resamples)
    return estimate_of(needed_by_draw([*sizes, full_size], means, share), right.shape[1])


def needed_by_draw(sizes: Sequence[float], means: Floats, share: float) -> Floats:
    """:func:`bytes_needed` for each draw of questions: accuracies ``[points, draws]`` to bytes ``[draws]``.

    The last point is the full cache.
    """
    order = np.argsort(sizes, kind="stable")
    logs = np.log(np.asarray(sizes, np.float64)[order])
    found: Floats = np.exp(_first_reach(logs, means[order], share * means[-1]))
    return found


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
