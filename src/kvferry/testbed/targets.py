"""What every visual token of a scene ought to know, for the tower's dense heads and for symbolic pictures.

Each token carries one label per *group* (colour, shape, first character, ...). The tower is first taught to predict
the labels; the language model is first taught on sums of one vector per label, without any tower.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import words
from .build import CELL
from .render import cover_map
from .scenes import Scene, Thing, neighbour

Labels = npt.NDArray[np.int64]
IGNORE = -100

_COLOURS = list(words.ALL_COLOURS)
_SHAPES = list(words.ALL_SHAPES)
_CHARACTERS = [*words.DIGITS, *words.GLYPH_LETTERS]

GROUPS: dict[str, int] = {
    "colour": len(_COLOURS),
    "shape": len(_SHAPES),
    "first": len(_CHARACTERS),
    "second": len(words.DIGITS),
    "level": len(words.SIZES),
    "word": len(words.LEXICON),
    "ink": len(_COLOURS),
    "centre": 1,
}
for _direction in words.DIRECTIONS:
    GROUPS[f"{_direction} colour"] = len(_COLOURS)
    GROUPS[f"{_direction} shape"] = len(_SHAPES)
    GROUPS[f"{_direction} glyph"] = len(_CHARACTERS)
"""Group name -> number of labels; label 0 means "nothing of the kind"."""

COLUMN = {name: column for column, name in enumerate(GROUPS)}
SIZES = np.array(list(GROUPS.values()))
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)[:-1]])
WIDTH = int(SIZES.sum())
"""Number of labels of all groups together."""


def _glyph_labels(thing: Thing) -> tuple[int, int]:
    """First and second character; 0 where there is none."""
    first = _CHARACTERS.index(thing.glyph[0]) + 1 if thing.glyph else 0
    second = words.DIGITS.index(thing.glyph[1]) + 1 if len(thing.glyph) > 1 else 0
    return first, second


def centre_cell(scene: Scene, thing: Thing) -> int:
    """The visual token that holds a thing's centre."""
    return int(thing.y // CELL) * (scene.width // CELL) + int(thing.x // CELL)


def owners(scene: Scene) -> tuple[Labels, Labels]:
    """Which thing (1..) or sign (101..) each token shows, `[tokens]`, and which it shows clearly.

    The first array names the owner wherever something is visible at all, the second only where at least a fifth of
    the cell is covered, or where the thing's centre is.
    """
    rows, columns = scene.height // CELL, scene.width // CELL
    cells = cover_map(scene).reshape(rows, CELL, columns, CELL).swapaxes(1, 2).reshape(rows * columns, -1)
    codes = [*range(1, len(scene.things) + 1), *range(101, 101 + len(scene.signs))]
    if not codes:
        nothing = np.zeros(rows * columns, dtype=np.int64)
        return nothing, nothing
    cover = np.stack([(cells == code).mean(axis=1) for code in codes], axis=1)
    best = cover.argmax(axis=1)
    share = cover.max(axis=1)
    owner = np.array(codes, dtype=np.int64)[best]
    seen, clear = np.where(share > 0.04, owner, 0), np.where(share >= 0.2, owner, 0)
    for index, thing in enumerate(scene.things):
        seen[centre_cell(scene, thing)] = clear[centre_cell(scene, thing)] = index + 1
    return seen, clear


def dense_labels(scene: Scene) -> Labels:
    """One label per token and group, `[tokens, groups]`; -100 where the question is unfair."""
    seen, clear = owners(scene)
    labels = np.zeros((len(seen), len(GROUPS)), dtype=np.int64)
    labels[(seen != 0) & (clear == 0), : COLUMN["centre"]] = IGNORE
    for index, thing in enumerate(scene.things):
        here = clear == index + 1
        first, second = _glyph_labels(thing)
        own = [_COLOURS.index(thing.colour) + 1, _SHAPES.index(thing.shape) + 1, first, second, thing.level + 1]
        labels[here, :5] = own
        cell = centre_cell(scene, thing)
        labels[cell, COLUMN["centre"]] = 1
        for direction in words.DIRECTIONS:
            column = COLUMN[f"{direction} colour"]
            other = neighbour(scene, index, direction)
            if other == -1 or direction not in words.ASKED_DIRECTIONS:
                labels[cell, column : column + 3] = IGNORE
            elif other is not None:
                beside = scene.things[other]
                glyph, second = _glyph_labels(beside)
                labels[cell, column : column + 3] = [
                    _COLOURS.index(beside.colour) + 1,
                    _SHAPES.index(beside.shape) + 1,
                    0 if second else glyph,
                ]
    for index, sign in enumerate(scene.signs):
        here = clear == 101 + index
        labels[here, COLUMN["word"]] = words.LEXICON.index(sign.word) + 1
        labels[here, COLUMN["ink"]] = _COLOURS.index(sign.colour) + 1
    return labels


def multi_hot(labels: Labels) -> npt.NDArray[np.float32]:
    """Labels `[..., groups]` as zeros and ones `[..., WIDTH]`; "nothing" and "unfair" are all zeros."""
    flat = labels.reshape(-1, labels.shape[-1])
    hot = np.zeros((len(flat), WIDTH), dtype=np.float32)
    rows, columns = np.nonzero(flat > 0)
    hot[rows, OFFSETS[columns] + flat[rows, columns] - 1] = 1.0
    return hot.reshape(*labels.shape[:-1], WIDTH)
