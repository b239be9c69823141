"""The testbed as others use it: endless, seeded, disjoint splits of pictures with a question and its answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .questions import KINDS, Question, ask, ask_pair
from .render import render
from .scenes import Box, Scene, draw_scene

SPLITS: dict[str, int] = {"train": 101, "calibration": 102, "validation": 103, "test": 104}
"""Every split has its own family of seeds `(code, index)`; no seed belongs to two."""

SIDES = (192, 208, 224, 240, 256)
PAIR_SIDES = (192, 208)


@dataclass(frozen=True)
class Sample:
    """One prompt of the testbed.

    `evidence_boxes` are `(picture, x0, y0, x1, y1)` in pixels: the things that decide the answer.
    """

    images: list[Image.Image]
    question: str
    answer: str
    kind: str
    split: str
    index: int
    evidence_boxes: list[tuple[int, int, int, int, int]]
    scenes: tuple[Scene, ...] = field(repr=False)


def _boxes(question: Question, scene: Scene) -> list[tuple[int, int, int, int, int]]:
    boxes: list[Box] = [scene.things[i].box for i in question.decisive]
    boxes += [scene.signs[i].box for i in question.signs]
    return [(question.picture, *box) for box in boxes]


def draw_question(rng: np.random.Generator, kind: str) -> tuple[tuple[Scene, ...], Question]:
    """Draw scenes until one has a question of the kind."""
    sides = PAIR_SIDES if kind == "pair" else SIDES
    while True:
        scenes = tuple(
            draw_scene(rng, int(rng.choice(sides)), int(rng.choice(sides))) for _ in range(2 if kind == "pair" else 1)
        )
        question = ask_pair(rng, (scenes[0], scenes[1])) if kind == "pair" else ask(rng, scenes[0], kind)
        if question is not None:
            return scenes, question


def sample(split: str, index: int, *, kinds: Sequence[str] | None = None) -> Sample:
    """The sample with this index; its scenes belong to no other sample and no other split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    kinds = tuple(kinds or KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r}: choose from {', '.join(KINDS)}")
    if index < 0:
        raise ValueError("a sample's index starts at 0")
    kind = kinds[index % len(kinds)]
    scenes, question = draw_question(np.random.default_rng((SPLITS[split], index)), kind)
    images = [render(scene) for scene in scenes]
    boxes = _boxes(question, scenes[question.picture])
    return Sample(images, question.text, question.answer, kind, split, index, boxes, scenes)


def samples(split: str, n: int, *, start: int = 0, kinds: Sequence[str] | None = None) -> Iterator[Sample]:
    """Draw `n` samples, lazily; kinds take turns and every sample has its own scene.

    Parameters
    ----------
    split
        "train", "calibration", "validation" or "test".
    n
        How many.
    start
        Index of the first.
    kinds
        Which kinds take turns; all of them by default.
    """
    for index in range(start, start + n):
        yield sample(split, index, kinds=kinds)


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two answers are the same words; case and spacing do not matter, nor does spacing inside words."""
    return re.sub(r"\s+", "", prediction.lower()) == re.sub(r"\s+", "", answer.lower())
