"""Statistics of a stream in fixed memory: running means, and reservoirs of what arrived."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

KEPT_ROWS = 2048
"""Per-sample values kept for intervals. Of more samples a uniform draw is kept, which widens intervals, never
narrows them."""


class Running:
    """Mean and spread of arrays of one shape (Welford, Technometrics 4, 1962). NaN means: not measured this time."""

    def __init__(self) -> None:
        self.count: Any = np.zeros(())
        self._mean: Any = np.zeros(())
        self._squares: Any = np.zeros(())

    def add(self, values: npt.ArrayLike) -> None:
        """Take in one array."""
        array = np.asarray(values, np.float64)
        seen = ~np.isnan(array)
        self.count = self.count + seen
        step = np.where(seen, array - self._mean, 0.0)
        self._mean = self._mean + step / np.maximum(self.count, 1)
        self._squares = self._squares + step * np.where(seen, array - self._mean, 0.0)

    @property
    def mean(self) -> Array:
        """Mean of what was measured; NaN where nothing was."""
        result: Array = np.where(self.count > 0, self._mean, np.nan)
        return result

    @property
    def spread(self) -> Array:
        """Standard deviation over samples (``n - 1``); NaN below two samples."""
        result: Array = np.where(self.count > 1, np.sqrt(self._squares / np.maximum(self.count - 1, 1)), np.nan)
        return result

    @property
    def margin(self) -> Array:
        """Half the width of the mean's 95 % interval under the normal approximation; for bands in figures."""
        result: Array = 1.96 * self.spread / np.sqrt(np.maximum(self.count, 1))
        return result


class Reservoir:
    """A uniform sample of fixed size from a stream of unknown length (algorithm R: Vitter, ACM TOMS 11, 1985)."""

    def __init__(self, size: int = KEPT_ROWS, seed: int = 0) -> None:
        self._size = size
        self._items: list[npt.NDArray[Any]] = []
        self._draw = np.random.default_rng(seed)
        self.offered = 0

    def add(self, item: npt.ArrayLike) -> None:
        """Offer one item."""
        self.offered += 1
        if len(self._items) < self._size:
            self._items.append(np.array(item))
            return
        slot = int(self._draw.integers(self.offered))
        if slot < self._size:
            self._items[slot] = np.array(item)

    @property
    def rows(self) -> npt.NDArray[Any]:
        """What was kept, ``[at most size, ...]``."""
        return np.stack(self._items) if self._items else np.zeros((0,))


def mean_over(values: npt.ArrayLike, axis: int | tuple[int, ...]) -> Array:
    """Mean over ``axis`` of what was measured; NaN where nothing was."""
    array = np.asarray(values, np.float64)
    seen = ~np.isnan(array)
    total, count = np.where(seen, array, 0.0).sum(axis), seen.sum(axis)
    result: Array = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return result
