"""What a visual token should give the language model: the sum of its own word vectors of what is there.

The projector learns this first, by least squares; after it the language model already half reads pictures.
"""

from __future__ import annotations

from typing import Any

import torch

from kvferry.testbed import words
from kvferry.testbed.targets import GROUPS, OFFSETS, WIDTH

_CHARACTERS = [*words.DIGITS, *(letter.upper() for letter in words.GLYPH_LETTERS)]
_SECOND = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""A second digit is told from the first by its name: a sum of vectors has no order."""
_NAMES: dict[str, list[str]] = {
    "colour": [f" {name}" for name in words.ALL_COLOURS],
    "shape": [f" {name}" for name in words.ALL_SHAPES],
    "first": _CHARACTERS,
    "second": [f" {name}" for name in _SECOND],
    "level": [f" {name}" for name in words.SIZES],
    "word": [f" {name}" for name in words.LEXICON],
    "ink": [f" {name}" for name in words.ALL_COLOURS],
    "centre": [" object"],
}
_SHARES = {"level": 0.5, "centre": 0.5}
_BESIDE = 0.5
"""What stands beside a thing is said more softly, and with its channels turned, by a fifth for each direction."""


@torch.no_grad()
def label_vectors(tokenizer: Any, embedding: torch.Tensor) -> torch.Tensor:
    """One vector per label, ``[labels, hidden]``, from a language model's word vectors ``[vocabulary, hidden]``."""
    hidden = embedding.shape[1]

    def of(text: str) -> torch.Tensor:
        return embedding[tokenizer(text, add_special_tokens=False)["input_ids"]].float().mean(0)

    found = torch.zeros(WIDTH, hidden)
    for (group, size), start in zip(GROUPS.items(), OFFSETS.tolist(), strict=True):
        direction, _, what = group.rpartition(" ")
        names = _NAMES["first" if what == "glyph" else what]
        vectors = torch.stack([of(name) for name in names]) * _SHARES.get(group, 1.0)
        if direction:
            turn = list(words.DIRECTIONS).index(direction) + 1
            vectors = _BESIDE * vectors.roll(turn * hidden // 5, dims=1)
        found[start : start + size] = vectors
    return found
