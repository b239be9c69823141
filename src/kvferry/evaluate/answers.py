"""Right and wrong answers, and bytes, of every row of a results file; intervals by drawing questions anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.evaluate.plan import BARE
from kvferry.evaluate.records import Line, Outcome, Protocol
from kvferry.evaluate.tables import mean_scored
from kvferry.statistics import Estimate, estimate_of, means_with_draws

Floats = npt.NDArray[np.float64]


class Answers:
    """Right and wrong, and bytes, of every row of one protocol; only questions that every row answered count."""

    def __init__(self, lines: Sequence[Line], protocol: Protocol) -> None:
        mine = sorted((x for x in lines if x.protocol == protocol), key=lambda x: x.index)
        self.names = list(mine[0].outcomes)
        self.lines = [x for x in mine if list(x.outcomes) == self.names]
        self.n = len(self.lines)
        full = min((n for n in self.names if n.startswith("full|")), key=lambda n: n != "full|bf16", default=None)
        if full is None:
            raise InputError("a table needs its ceiling: sweep a recipe such as 'full|bf16' too")
        self.full: str = full
        self.floor = next((n for n in self.names if n.startswith("none|") or n == BARE), None)
        self.correct = np.array([[x.outcomes[n][0] for x in self.lines] for n in self.names], np.float64)
        self.bytes = {n: float(np.mean([x.outcomes[n][1] for x in self.lines])) for n in self.names}
        self.bf16 = float(np.mean([x.bf16_bytes for x in self.lines]))
        self._row = {name: i for i, name in enumerate(self.names)}
        self.groups = [x.group for x in self.lines]
        self._means = means_with_draws(self.correct, groups=self.groups)

    def accuracy(self, row: str) -> Estimate:
        """Share of right answers."""
        return estimate_of(self._means[self._row[row]], self.n)

    def scored(self, row: str) -> float | None:
        """Share of the kept tokens that the scorer chose; None where it is not known or there was no choice."""
        return mean_scored([Outcome(*x.outcomes[row]).scored for x in self.lines])

    def estimate(self, draws: Floats) -> Estimate:
        """Of draws, the first of which is what was measured, and of ratios of such."""
        return estimate_of(draws, self.n)

    def kinds(self) -> list[str]:
        """Of question."""
        return sorted({x.kind for x in self.lines})

    def of_kind(self, kind: str) -> tuple[int, dict[str, Floats]]:
        """How many questions of a kind, and of each row the mean and its draws among them."""
        mine = np.array([x.kind == kind for x in self.lines])
        groups = [x.group for x in self.lines if x.kind == kind]
        means = means_with_draws(self.correct[:, mine], groups=groups)
        return int(mine.sum()), dict(zip(self.names, means, strict=True))
