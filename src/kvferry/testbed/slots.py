"""Many questions per picture in one sequence.

A sequence is the picture's prefix followed by *slots*, one per question: the question, the turn markers, the answer.
Every slot starts at the position where a lone question would start and sees the prefix and itself only, so its
logits are those of the plain single-question prompt, but the picture is paid for once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from . import words
from .build import CELL
from .questions import Question
from .scenes import Scene
from .targets import centre_cell, owners
from .words import TOKEN_ID

Ints = npt.NDArray[np.int64]

_READ_WORDS = frozenset(
    (
        *words.DIGITS, *"abcdefghijklmnopqrstuvwxyz", *words.ALL_COLOURS, *words.ALL_SHAPES,
        *words.ALL_SHAPES.values(), *words.DIRECTIONS, *words.NAMES, "colour", "digit", "letter", "number", "word",
        "many", "there", "first", "second", "largest", "smallest",
    )
)  # fmt: skip
"""The words of a question that an answer hangs on."""


def encode(text: str) -> list[int]:
    """Token ids of a question or an answer of the testbed; every word must be in the vocabulary."""
    for mark in ".,?:!":
        text = text.replace(mark, f" {mark} ")
    return [TOKEN_ID[word] for word in text.split()]


@dataclass(frozen=True)
class Guide:
    """Attention worth learning first: some rows of one role should look at any of some columns."""

    role: str
    row: int
    columns: tuple[int, ...]


@dataclass
class Packed:
    """One sequence before padding."""

    ids: list[int]
    positions: Ints
    segments: list[int]
    answers: list[tuple[int, int, int]]
    """(row, token to predict, question index)."""
    guides: list[Guide]


@dataclass
class Batch:
    """Padded sequences, ready for the language model."""

    ids: torch.Tensor
    positions: torch.Tensor
    """`[3, batch, length]`."""
    mask: torch.Tensor
    """Additive, `[batch, 1, length, length]`."""
    rows: tuple[torch.Tensor, torch.Tensor]
    """(batch index, row) of every answer token."""
    wanted: torch.Tensor
    questions: torch.Tensor
    """Index of the question that each answer token belongs to, over the whole batch."""
    kinds: list[str]
    """Kind of every question of the batch."""
    segments: list[list[int]]
    """Of each sequence before it was padded: 0 is the prefix, 1.. are its questions."""
    guides: list[list[Guide]]


def prefix(scenes: Sequence[Scene]) -> tuple[list[int], Ints, list[int]]:
    """Token ids, positions `[3, length]` and first picture token of each picture, up to the question."""
    ids = [TOKEN_ID[words.IM_START], TOKEN_ID["user"]]
    columns: list[Ints] = [np.arange(2)[None].repeat(3, 0)]
    position, starts = 2, []
    for scene in scenes:
        rows, cells = scene.height // CELL, scene.width // CELL
        ids += [TOKEN_ID[words.VISION_START], *[TOKEN_ID[words.IMAGE_PAD]] * (rows * cells)]
        ids.append(TOKEN_ID[words.VISION_END])
        starts.append(len(ids) - 1 - rows * cells)
        r, c = np.divmod(np.arange(rows * cells), cells)
        after = position + 1 + max(rows, cells)
        columns += [np.full((3, 1), position), np.stack([r * 0, r, c]) + position + 1, np.full((3, 1), after)]
        position = after + 1
    return ids, np.concatenate(columns, axis=1), starts


def _picture_guides(scenes: Sequence[Scene], question: Question, starts: list[int]) -> list[tuple[int, ...]]:
    """Groups of picture tokens that the answer should look at; the first token where there is nothing to see."""
    if question.kind == "lookup":
        return []
    scene, start = scenes[question.picture], starts[question.picture]
    clear = owners(scene)[1]
    if question.signs:
        return [tuple(start + np.flatnonzero(clear == 101 + i)) for i in question.signs]
    if question.kind in ("relation", "two_hop"):
        return [(start + centre_cell(scene, scene.things[question.named[0]]),)]
    if question.kind == "count":
        # The first token counts as one more: its share of the attention, 1 / (n + 1), tells the number.
        return [(0,), *((start + centre_cell(scene, scene.things[i]),) for i in question.decisive)]
    return [tuple(start + np.flatnonzero(clear == i + 1)) for i in question.decisive[:1]] or [(0,)]


def _note_guides(ids: list[int], answer: int, offset: int, rows: list[int]) -> list[Guide]:
    """In "tom has 4", let 4 look back at tom, and the answer at the asked one's 4."""
    has = [i for i, token in enumerate(ids) if token == TOKEN_ID["has"]][:-1]
    guides = [Guide("link", offset + i + 1, (offset + i - 1,)) for i in has]
    value = next(i + 1 for i in has if ids[i + 1] == answer)
    return guides + [Guide("look", row, (offset + value,)) for row in rows]


def pack(scenes: Sequence[Scene], questions: Sequence[Question], *, guided: bool = False) -> Packed:
    """One prefix and its slots."""
    ids, positions, starts = prefix(scenes)
    segments, answers, guides = [0] * len(ids), [], []
    first = int(positions.max()) + 1
    everywhere = [positions]
    for number, question in enumerate(questions):
        asked, said = encode(question.text), [*encode(question.answer), TOKEN_ID[words.IM_END]]
        turn = [TOKEN_ID[words.IM_END], TOKEN_ID[words.IM_START], TOKEN_ID["assistant"]]
        slot = [*asked, *turn, *said[:-1]]
        offset, start = len(ids), len(asked) + len(turn) - 1
        answers += [(offset + start + i, token, number) for i, token in enumerate(said)]
        ids += slot
        segments += [number + 1] * len(slot)
        everywhere.append(np.arange(first, first + len(slot))[None].repeat(3, 0))
        if guided:
            rows = [offset + start + i for i in range(len(said) - 1)]
            reading = [offset + i for i, token in enumerate(asked) if words.VOCABULARY[token] in _READ_WORDS]
            if question.kind == "lookup":
                reading = reading[-1:]
                guides += _note_guides(asked, said[0], offset, rows)
            guides += [Guide("read", row, (column,)) for row in rows for column in reading]
            groups = _picture_guides(scenes, question, starts)
            guides += [Guide("look", row, group) for row in rows for group in groups if group]
    if guided and len(scenes) == 2:
        second = starts[1] + np.flatnonzero(owners(scenes[1])[1])[:12]
        guides += [Guide("link", int(row), (starts[1] - 2,)) for row in second]
    return Packed(ids, np.concatenate(everywhere, axis=1), segments, answers, guides)


def collate(packed: Sequence[Packed], kinds: list[list[str]]) -> Batch:
    """Pad sequences to one length and build the block mask."""
    length = -(-max(len(p.ids) for p in packed) // 32) * 32
    ids = torch.zeros(len(packed), length, dtype=torch.long)
    positions = torch.zeros(3, len(packed), length, dtype=torch.long)
    segments = torch.full((len(packed), length), -1)
    batch_index, rows, wanted, owner = [], [], [], []
    before = 0
    for b, p in enumerate(packed):
        ids[b, : len(p.ids)] = torch.tensor(p.ids)
        positions[:, b, : len(p.ids)] = torch.from_numpy(p.positions)
        segments[b, : len(p.ids)] = torch.tensor(p.segments)
        for row, token, question in p.answers:
            batch_index.append(b)
            rows.append(row)
            wanted.append(token)
            owner.append(before + question)
        before += len(kinds[b])
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    allowed = earlier & (same | (segments == 0)[:, None, :])
    mask = torch.zeros(len(packed), 1, length, length).masked_fill(~allowed[:, None], -1e9)
    return Batch(
        ids,
        positions,
        mask,
        (torch.tensor(batch_index), torch.tensor(rows)),
        torch.tensor(wanted),
        torch.tensor(owner),
        [kind for group in kinds for kind in group],
        [p.segments for p in packed],
        [p.guides for p in packed],
    )
