"""What a metric is: a score for each answer, and further figures of a whole table row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What one row said to ``n`` questions.

    Parameters
    ----------
    said : sequence of str
    references : sequence of sequences of str
        The accepted answers of each question.
    groups : sequence of str
        Questions of one group (such as those on one picture) are drawn together when intervals are made; an empty name
        is a group of its own.
    scores : float64 ``[n]``
        What :meth:`Metric.score` gave; NaN where it gave None.
    """

    said: Sequence[str]
    references: Sequence[Sequence[str]]
    groups: Sequence[str]
    scores: Floats


@dataclass(frozen=True)
class Figure:
    """A figure that is the ratio of two sums over questions, both float64 ``[n]``: a mean where ``under`` is one."""

    name: str
    over: Floats
    under: Floats


@dataclass(frozen=True)
class Metric:
    """How answers are judged. One metric per file, each with its source."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    def score(self, said: str, references: Sequence[str]) -> float | None:
        """Of one answer; None where only all answers together have scores."""
        return None

    def scores(self, answers: Answers) -> Floats:
        """Of all answers, float64 ``[n]``."""
        return answers.scores

    def figures(self, answers: Answers) -> list[Figure]:
        """What a table shows beside the mean score."""
        return []

    def shown(self, mean: float) -> float:
        """The figure that a mean score stands for."""
        return mean


def mean_figure(name: str, values: Sequence[float] | Floats) -> Figure:
    """The mean of one value per question."""
    over = np.asarray(values, np.float64)
    return Figure(name, over, np.ones_like(over))
