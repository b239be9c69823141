"""Where pictures and questions come from: a file of one's own (:mod:`kvferry.data`), or the testbed's drawn scenes."""

from __future__ import annotations

from collections.abc import Iterator

from kvferry.data import Asked, Questions
from kvferry.errors import InputError

__all__ = ["Asked", "Questions", "drawn_questions"]


def drawn_questions(split: str, n: int) -> Questions:
    """The first ``n`` questions of a split of the testbed, where ``lookup`` questions need no picture."""
    from kvferry.testbed.data import SPLITS, samples

    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")

    def each() -> Iterator[Asked]:
        for one in samples(split, n):
            answers = (one.answer,)
            yield Asked(f"{split} {one.index}", tuple(one.images), one.question, one.kind != "lookup", answers)

    return Questions(f"{n} {split} questions of the testbed", n, each)
