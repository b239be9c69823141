"""``equal``: everybody the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.link.trace import Array
from kvferry.policy.allocation.base import Options
from kvferry.policy.allocation.grants import above_reserve
from kvferry.policy.situation import Indices


@dataclass(frozen=True)
class Equal:
    """The link in equal parts, after everybody's fallback."""

    def share(self, options: Options, budget: Array) -> tuple[Indices, Array]:
        """Points and rates, ``[lanes, agents]``."""
        return above_reserve(options, budget, np.ones((1, len(options.fallback))))
