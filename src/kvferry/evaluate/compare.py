"""Two runs on the same questions, row by row, paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvferry.errors import InputError
from kvferry.evaluate.records import Line, Protocol
from kvferry.evaluate.results import Results
from kvferry.statistics import FEWEST, TOO_FEW, Estimate, estimate_of, holm, means_with_draws, paired_p


@dataclass(frozen=True)
class Paired:
    """A row of the first run and one of the second.

    Parameters
    ----------
    row, other : str
    one, two : Estimate
        Mean scores, over the questions that both runs asked.
    difference : Estimate
        ``two - one``, paired.
    p : float
        Two-sided (:func:`kvferry.statistics.paired_p`), adjusted for how many rows are compared (Holm).
    bytes, other_bytes : float
        Means.
    """

    row: str
    other: str
    one: Estimate
    two: Estimate
    difference: Estimate
    p: float
    bytes: float
    other_bytes: float

    @property
    def words(self) -> str:
        """What the interval shows."""
        if self.difference.n < FEWEST:
            return TOO_FEW
        if self.difference.low <= 0 <= self.difference.high:
            return "no difference shown"
        return "higher" if self.difference.mean > 0 else "lower"


def compare(one: Results, two: Results, row: str = "", other: str = "") -> dict[Protocol, list[Paired]]:
    """Every row that both runs have, by protocol; or ``row`` of the first with ``other`` (the same) of the second.

    Raises
    ------
    InputError
        The runs asked other questions, judged them otherwise, or share no row.
    """
    if one.score != two.score:
        raise InputError(f"{one.path} holds {one.score}, {two.path} {two.score}; compare runs with one metric")
    both = sorted(one.questions.keys() & two.questions.keys())
    if not both:
        raise InputError(f"{one.path} and {two.path} share no question; run both on the same ones (--n, --start)")
    for index in both:
        if one.questions[index] != two.questions[index]:
            raise InputError(
                f"question {index} of {one.path} ({one.asked}) is another one in {two.path} ({two.asked}); compare "
                "runs on the same questions"
            )
    found = {p: _paired(one, two, p, row, other or row) for p in one.protocols if p in two.protocols}
    if not any(found.values()):
        wanted = f"the row {row!r} and {other or row!r}" if row else "no row"
        raise InputError(
            f"{one.path} and {two.path} have {'not ' if row else ''}{wanted} in common; the first has "
            f"{', '.join(one.lines[0].outcomes)}, the second {', '.join(two.lines[0].outcomes)}"
        )
    return {protocol: pairs for protocol, pairs in found.items() if pairs}


def _paired(one: Results, two: Results, protocol: Protocol, row: str, other: str) -> list[Paired]:
    mine, theirs = _by_index(one.lines, protocol), _by_index(two.lines, protocol)
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return []
    left, right = [mine[i] for i in both], [theirs[i] for i in both]
    names = [(row, other)] if row else [(x, x) for x in left[0].outcomes]
    pairs = [_pair(left, right, a, b) for a, b in names if a in left[0].outcomes and b in right[0].outcomes]
    return [replace(x, p=p) for x, p in zip(pairs, holm([x.p for x in pairs]), strict=True)]


def _by_index(lines: Sequence[Line], protocol: Protocol) -> dict[int, Line]:
    return {x.index: x for x in lines if x.protocol == protocol}


def _pair(left: Sequence[Line], right: Sequence[Line], row: str, other: str) -> Paired:
    scores = np.array([[x.outcomes[row][0] for x in left], [x.outcomes[other][0] for x in right]], np.float64)
    draws, n = means_with_draws(scores, groups=[x.group for x in left]), len(left)
    return Paired(
        row,
        other,
        estimate_of(draws[0], n),
        estimate_of(draws[1], n),
        estimate_of(draws[1] - draws[0], n),
        paired_p(scores[1], scores[0]),
        float(np.mean([x.outcomes[row][1] for x in left])),
        float(np.mean([x.outcomes[other][1] for x in right])),
    )
