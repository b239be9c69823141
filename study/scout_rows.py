"""A trial of mode scout as rows: overlaps, answers and bytes with their intervals, on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.evaluate.measured import Comparison
from kvferry.selection import kept_count
from kvferry.statistics import Estimate, difference_interval, mcnemar, mean_interval, ratio_interval
from study.scout import Found, ScoutLine, Trial

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FORMS = ("bitmap", "runs", "coded", "Elias-Fano", "16-bit list")
"""Three that mode scout chooses among, and two it has not: their sizes follow from how many tokens of how many."""


def elias_fano_bytes(kept: int, tokens: int) -> int:
    """A sorted list of ``kept`` of ``tokens`` positions, lower bits as they are and upper ones in unary.

    P. Elias, "Efficient storage and retrieval by content and address of static files" (1974); R. M. Fano (1971).
    """
    low = max(0, math.floor(math.log2(tokens / kept)))
    return math.ceil((kept * low + kept + (tokens - 1 >> low)) / 8)


class Scouted:
    """All questions of one trial. Rows of answers are ``full``, ``none``, ``alone`` and ``RANKING own|edge|random``."""

    ENDS: ClassVar[dict[str, str]] = {
        "full": "the full cache (ceiling)",
        "none": "no visual token (floor)",
        "alone": "the edge's model alone",
    }

    def __init__(self, head: dict[str, Any], lines: Sequence[ScoutLine]) -> None:
        if not lines:
            raise InputError("the trial holds no questions yet; run `python -m study scout-overlap`")
        plan: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in head["scout"].items()}
        self.trial = Trial(**plan)
        self.head, self.lines, self.n = head, lines, len(lines)
        self.rankings = self.trial.rankings
        self._found = np.array([line.found for line in lines], np.int64)
        self._right: dict[str, Floats] = {
            name: np.array([getattr(line, name) for line in lines], np.float64) for name in self.ENDS
        }
        random = np.array([line.random for line in lines], np.float64)
        for place, row in enumerate(self.rankings):
            self._right[f"{row} own"], self._right[f"{row} edge"] = self._column(row, "own"), self._column(row, "edge")
            self._right[f"{row} random"] = random[:, place % len(self.trial.fractions)]

    def _column(self, row: str, field: str) -> Floats:
        found: Floats = self._found[:, self.rankings.index(row), Found._fields.index(field)].astype(np.float64)
        return found

    def _sizes(self, row: str) -> tuple[Floats, Floats]:
        """How many tokens stay, and of how many, for every question."""
        fraction = float(row.partition("@")[2])
        tokens = [line.visual for line in self.lines]
        return np.array([kept_count(fraction, x) for x in tokens], np.float64), np.array(tokens, np.float64)

    def overlap(self, row: str) -> Estimate:
        """``|A and B| / k`` of the two models' sets."""
        return mean_interval(self._column(row, "both") / self._sizes(row)[0])

    def jaccard(self, row: str) -> Estimate:
        """``|A and B| / |A or B|``."""
        both = self._column(row, "both")
        return mean_interval(both / (2 * self._sizes(row)[0] - both))

    def chance(self, row: str) -> Estimate:
        """The overlap that a random set of the same size is expected to have, ``k / n``."""
        kept, tokens = self._sizes(row)
        return mean_interval(kept / tokens)

    def accuracy(self, row: str) -> Estimate:
        """Share of right answers."""
        return mean_interval(self._right[row])

    def share(self, row: str, other: str) -> Estimate:
        """Right answers of ``row`` as a share of those of ``other``."""
        return ratio_interval(self._right[row], self._right[other])

    def compare(self, row: str, other: str) -> Comparison:
        """Paired, ``row`` minus ``other``."""
        one, two = self._right[row], self._right[other]
        return Comparison(difference_interval(one, two), mcnemar(one, two))

    def sent(self, row: str) -> Estimate:
        """Bytes of the positions as they cross the wire, message and checksum included."""
        return mean_interval(self._column(row, "sent"))

    def bytes_as(self, row: str, form: str) -> Floats:
        """Bytes of the positions alone in one of :data:`FORMS`, for every question."""
        kept, tokens = self._sizes(row)
        if form in Found._fields:
            return self._column(row, form)
        if form == "bitmap":
            return np.ceil(tokens / 8)
        if form == "16-bit list":
            return 2 * kept
        pairs = zip(kept.astype(int).tolist(), tokens.astype(int).tolist(), strict=True)
        return np.array([elias_fano_bytes(k, t) for k, t in pairs], np.float64)

    def shrink(self, row: str, form: str | None = None) -> Estimate:
        """How many times fewer bytes than the cloud's full cache in BF16: as sent, or in a form alone."""
        sizes = self._column(row, "sent") if form is None else self.bytes_as(row, form)
        return ratio_interval([line.bf16_bytes for line in self.lines], sizes)

    def bound(self) -> Floats:
        """A bit per visual token, in bytes, for every question."""
        return np.array([line.visual / 8 for line in self.lines])

    def within(self, row: str, framed: bool) -> float:
        """Share of questions whose smallest form, or framed message, takes at most a bit a token, in whole bytes."""
        forms = np.min([self.bytes_as(row, form) for form in ("bitmap", "runs", "coded")], axis=0)
        sizes = self._column(row, "sent") if framed else forms
        return float((sizes <= np.ceil(self.bound())).mean())

    def summary(self) -> list[dict[str, Any]]:
        """One record per ranking, for scripts."""
        return [
            {
                "ranking": row,
                "overlap": self.overlap(row).mean,
                "jaccard": self.jaccard(row).mean,
                "chance": self.chance(row).mean,
                **{whose: self.accuracy(f"{row} {whose}").mean for whose in ("own", "edge", "random")},
                "bytes": self.sent(row).mean,
            }
            for row in self.rankings
        ]
