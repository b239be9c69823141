"""``model_aware``: in proportion to what each would like to send."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.link.trace import Array
from kvferry.policy.allocation.base import Options
from kvferry.policy.allocation.grants import above_reserve
from kvferry.policy.situation import Indices


@dataclass(frozen=True)
class ModelAware:
    """In proportion to the bytes of each agent's best point (Cheng and Liao 2026), after everybody's fallback."""

    def share(self, options: Options, budget: Array) -> tuple[Indices, Array]:
        """Points and rates, ``[lanes, agents]``."""
        best = options.best_within(np.full((1, len(options.fallback)), np.finfo(float).max))[0]
        payload = options.nbytes[np.arange(len(best)), np.maximum(best, 0)]
        return above_reserve(options, budget, np.where(best >= 0, payload, 0.0)[None])
