"""Perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics.base import Metric


@dataclass(frozen=True)
class Perplexity(Metric):
    """Two to the bits, or e to the nats, that a token costs: the exponential of the mean negative log-likelihood.

    A score is the mean of one continuation in nats; all continuations have equally many tokens.
    """

    name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    def shown(self, mean: float) -> float:
        """``exp(mean)``."""
        return math.exp(mean)
