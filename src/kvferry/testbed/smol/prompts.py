"""Many questions behind one prefix in one sequence, in SmolLM2's own tokens.

As in :mod:`kvferry.testbed.slots`: every slot starts where a lone question would and sees the prefix and itself only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from kvferry.testbed.questions import Question
from kvferry.testbed.slots import Ints, Packed
from kvferry.testbed.words import IM_END, IM_START

from .build import RENAMED, SYSTEM

Grid = tuple[int, int]
"""Rows and columns of a picture's tokens."""

_START, _END, _PAD, _VIDEO = RENAMED
AFTER = f"{IM_END}\n{IM_START}assistant\n"


class Prompts:
    """Turns questions into token ids as the chat template would.

    Parameters
    ----------
    tokenizer
        Of the grown model.
    """

    def __init__(self, tokenizer: object) -> None:
        self._encode = lru_cache(maxsize=1 << 16)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]
        )

    def prefix(self, grids: Sequence[Grid]) -> tuple[list[int], Ints]:
        """Token ids and positions ``[3, length]`` of all that stands before a question."""
        if not grids:
            ids = list(self._encode(f"{IM_START}system\n{SYSTEM}{IM_END}\n{IM_START}user\n"))
            return ids, np.arange(len(ids))[None].repeat(3, 0)
        ids = list(self._encode(f"{IM_START}user\n"))
        columns: list[Ints] = [np.arange(len(ids))[None].repeat(3, 0)]
        position = len(ids)
        for rows, cells in grids:
            ids += [_START, *[_PAD] * (rows * cells), _END]
            r, c = np.divmod(np.arange(rows * cells), cells)
            after = position + 1 + max(rows, cells)
            columns += [np.full((3, 1), position), np.stack([r * 0, r, c]) + position + 1, np.full((3, 1), after)]
            position = after + 1
        return ids, np.concatenate(columns, axis=1)

    def slot(self, question: Question) -> tuple[list[int], list[int]]:
        """Token ids from the question to the assistant's turn, and of the answer with its end."""
        asked = [*self._encode(question.text), *self._encode(AFTER)]
        return asked, [*self._encode(question.answer), *self._encode(IM_END)]

    def pack(self, grids: Sequence[Grid], questions: Sequence[Question]) -> Packed:
        """One prefix and its slots."""
        ids, positions = self.prefix(grids)
        segments, everywhere = [0] * len(ids), [positions]
        first = int(positions.max()) + 1
        answers = []
        for number, question in enumerate(questions):
            asked, said = self.slot(question)
            start = len(ids) + len(asked) - 1
            answers += [(start + i, token, number) for i, token in enumerate(said)]
            ids += [*asked, *said[:-1]]
            length = len(asked) + len(said) - 1
            segments += [number + 1] * length
            everywhere.append(np.arange(first, first + length)[None].repeat(3, 0))
        return Packed(ids, np.concatenate(everywhere, axis=1), segments, answers, [])
