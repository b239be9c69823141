"""Exact match, and the same for an answer within a sentence."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics.base import Metric

AROUND = " \t\r\n.,;:!?\"'`*_()[]{}“”„‘’"
"""Signs that may stand around an answer."""


def plain(text: str) -> str:
    """What is compared: no capitals, no spacing, no signs of :data:`AROUND` at either end, unless it is all signs."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", "", text.strip(AROUND) or text)


@dataclass(frozen=True)
class ExactMatch(Metric):
    """1 where an answer is one of the references but for case, spacing, and signs around it: "Red." is red."""

    name: ClassVar[str] = "accuracy"

    def score(self, said: str, references: Sequence[str]) -> float:
        """0 or 1."""
        return float(plain(said) in [plain(reference) for reference in references])


@dataclass(frozen=True)
class Contains(Metric):
    """1 where the words of a reference stand in an answer, one after the other: "The circle is red." is right of red.

    Words, not letters: 14 does not hold 4. It says nothing against an answer that lists everything.
    """

    name: ClassVar[str] = "accuracy (contained)"

    def score(self, said: str, references: Sequence[str]) -> float:
        """0 or 1."""
        given = _words(said)
        return float(any(_within(_words(reference), given) for reference in references))


def _words(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold().strip(AROUND))


def _within(part: list[str], whole: list[str]) -> bool:
    return bool(part) and any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))
