"""Exact match and F1 of words, for SQuAD, TriviaQA and HotpotQA."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics.base import Answers, Figure, Metric, mean_figure

NO_ANSWER = "unanswerable"
"""What a model is told to say where a text holds no answer."""

_NO_SIGNS = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as SQuAD compares answers (arXiv 1606.05250)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_SIGNS)).split())


def word_f1(said: str, reference: str) -> float:
    """Harmonic mean of the shares of words that the two have in common; 1 for two empty answers, 0 for one."""
    given, wanted = normalise(said).split(), normalise(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


@dataclass(frozen=True)
class WordF1(Metric):
    """F1 of words with the nearest reference; a table shows exact match too.

    Without a reference the text holds no answer, and only an empty answer or :data:`NO_ANSWER` is right
    (P. Rajpurkar et al., "Know What You Don't Know", arXiv 1806.03822).
    """

    name: ClassVar[str] = "F1"

    def score(self, said: str, references: Sequence[str]) -> float:
        """From 0 to 1."""
        return max(word_f1(_given(said), reference) for reference in references or ("",))

    def figures(self, answers: Answers) -> list[Figure]:
        """Exact match."""
        pairs = zip(answers.said, answers.references, strict=True)
        return [mean_figure("EM", [exact(said, references) for said, references in pairs])]


def exact(said: str, references: Sequence[str]) -> float:
    """1 where an answer is one of the references once both are normalised."""
    return float(normalise(_given(said)) in [normalise(reference) for reference in references or ("",)])


def _given(said: str) -> str:
    return "" if normalise(said) == NO_ANSWER else said
