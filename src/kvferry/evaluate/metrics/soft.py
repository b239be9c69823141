"""Soft accuracy against the answers of several people, for VQAv2 and TextVQA."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics.base import Metric

_NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
PEOPLE, ENOUGH = 10, 3
"""How many the official evaluation asks, and how many of the others must have given an answer."""
_ARTICLES = ("a", "an", "the")
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """What a contraction looks like with one apostrophe forgotten, and what it should look like."""
    forgotten = {
        word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, sign in enumerate(word) if sign == "'"
    }
    return {**forgotten, "somebody'd": "somebodyd"}  # as in the official table, the wrong way round


_CONTRACTIONS = _contractions()


def normalise(text: str, *, possessives: bool = False) -> str:
    """An answer in the form in which the official VQA evaluation compares it.

    Signs vanish (next to a space anywhere in the text, or in a text with a comma between digits) or become spaces;
    full stops that no digit follows vanish; numbers up to ten become digits; articles go; apostrophes come back. Based
    on the evaluation code of S. Antol et al., "VQA: Visual Question Answering" (arXiv 1505.00468), quirks included.

    Parameters
    ----------
    possessives : bool
        First split off ``'s`` and drop commas and question marks, as TextVQA's evaluation (arXiv 1904.08920) does.
    """
    if possessives:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = bool(re.search(r"\d,+\d", text))
    plain = text
    for sign in _SIGNS:
        vanishes = joined or f"{sign} " in text or f" {sign}" in text
        plain = plain.replace(sign, "" if vanishes else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@dataclass(frozen=True)
class SoftAccuracy(Metric):
    """Mean over the people of ``min(1, others who gave this answer / 3)`` (arXiv 1505.00468, section 4).

    That is meant for ten people: an answer that three of the others gave is right. Of fewer, nobody is left out, and
    the same share of them has to agree: ``min(1, people who gave this answer / (0.3 people))``. So a right answer
    counts 1 where one, two or three people were asked, and 0.83 where one of four said it.

    Answers are always normalised, as EvalAI does. (The first evaluation script did so only where people disagree.)

    Parameters
    ----------
    possessives : bool
        See :func:`normalise`.
    """

    possessives: bool = False
    name: ClassVar[str] = "accuracy"

    def score(self, said: str, references: Sequence[str]) -> float:
        """From 0 to 1."""
        wanted = [normalise(reference, possessives=self.possessives) for reference in references]
        given = normalise(said, possessives=self.possessives)
        same = [given == answer for answer in wanted]
        if len(same) < PEOPLE:
            return min(1.0, sum(same) * PEOPLE / (ENOUGH * len(same))) if same else 0.0
        shares = [min(1.0, (sum(same) - mine) / ENOUGH) for mine in same]
        return sum(shares) / len(shares)
