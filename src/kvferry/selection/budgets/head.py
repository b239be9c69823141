"""Ada-KV: the heads of a layer compete for its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvferry.errors import InputError
from kvferry.selection.budgets.uniform import Uniform


@dataclass(frozen=True)
class Head(Uniform):
    """Every layer keeps the same number of entries; its heads share them by one ranking over all of them.

    Based on Ada-KV (arXiv 2407.11550): top-k over the concatenated scores of a layer's heads, where a safeguard keeps
    heads with flat attention from being emptied. The paper mixes the count that a head wins with the uniform one; we
    owe each head its own ``safeguard`` share of the uniform count and let the rest compete, which keeps the total
    exact. Needs a scorer that ranks per head.

    Parameters
    ----------
    safeguard : float
        Share of the uniform count that each head keeps at least, in [0, 1].
    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.safeguard <= 1.0:
            raise InputError(f"budget=head:{self.safeguard:g}: a head's safeguard is a share in [0, 1]")

    def least_per_head(self, keep: int) -> int | None:
        """The safeguard, at least one token."""
        return max(1, math.ceil(self.safeguard * keep))
