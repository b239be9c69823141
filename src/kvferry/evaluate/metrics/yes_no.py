"""Accuracy of yes and no, for POPE, and by pairs of questions on one picture, for MME."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvferry.errors import InputError
from kvferry.evaluate.metrics.base import Answers, Figure, Metric, mean_figure


def yes_or_no(said: str) -> str:
    """One of yes, no and other, by MME's rule: the first four characters hold the word, or the answer is its letter."""
    text = said.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


@dataclass(frozen=True)
class YesNo(Metric):
    """Share of right answers, with precision, recall and F1 of "yes", and how often "yes" was said.

    Y. Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (POPE, arXiv 2305.10355). What is
    neither yes nor no is wrong, and counts as "not yes".
    """

    name: ClassVar[str] = "accuracy"

    def score(self, said: str, references: Sequence[str]) -> float:
        """0 or 1.

        Raises
        ------
        InputError
            A reference is neither: whatever is neither would be right.
        """
        wanted = [yes_or_no(reference) for reference in references]
        if "other" in wanted:
            raise InputError(f"{references[wanted.index('other')]!r} is neither yes nor no; choose another metric")
        return float(yes_or_no(said) in wanted)

    def figures(self, answers: Answers) -> list[Figure]:
        """Precision, recall, F1, yes-ratio."""
        said = np.array([yes_or_no(text) == "yes" for text in answers.said], np.float64)
        is_so = np.array([bool(refs) and yes_or_no(refs[0]) == "yes" for refs in answers.references], np.float64)
        both = said * is_so
        return [
            Figure("precision", both, said),
            Figure("recall", both, is_so),
            Figure("F1", 2 * both, said + is_so),
            mean_figure("yes-ratio", said),
        ]


@dataclass(frozen=True)
class PairedYesNo(YesNo):
    """Share of right answers, and "acc+": share of pictures all of whose questions (two in MME) are answered rightly.

    C. Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models" (arXiv 2306.13394).
    MME's own score adds the two, in per cent, over its categories.
    """

    def figures(self, answers: Answers) -> list[Figure]:
        """acc+."""
        keys = [group or str(i) for i, group in enumerate(answers.groups)]
        asked, right = Counter(keys), Counter[str]()
        for key, score in zip(keys, answers.scores, strict=True):
            right[key] += int(score)
        share = np.array([1 / asked[key] for key in keys])
        complete = np.array([right[key] == asked[key] for key in keys], np.float64)
        return [Figure("acc+", share * complete, share)]
