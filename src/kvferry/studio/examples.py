"""Scenes to begin with: nothing is shipped, the testbed draws them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from PIL import Image

from kvferry.testbed import sample

CHOSEN = (0, 1, 4, 5, 7, 8, 9, 11)
"""Test questions of different kinds, one of them about two pictures."""


@dataclass(frozen=True)
class Example:
    """Pictures, a question, and the true answer."""

    pictures: tuple[Image.Image, ...]
    question: str
    truth: str


@cache
def examples() -> tuple[Example, ...]:
    """From the testbed's test split, which no shipped model was trained on."""
    drawn = (sample("test", index) for index in CHOSEN)
    return tuple(Example(tuple(x.images), x.question, x.answer) for x in drawn)
