"""Scenes on photographs with questions in English: single samples of a split, and packed batches to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

from kvferry.testbed.build import CELL
from kvferry.testbed.data import SPLITS, Sample
from kvferry.testbed.pixels import patches
from kvferry.testbed.questions import Question, ask, ask_pair
from kvferry.testbed.render import render
from kvferry.testbed.scenes import Scene, draw_scene
from kvferry.testbed.slots import Batch, Packed, collate
from kvferry.testbed.tower import batch_labels, scene_grids

from .english import KINDS, MAKERS, caption, in_english
from .photographs import backdrop
from .prompts import Prompts

SIDES = (128, 144, 160, 176, 192, 208, 224, 240, 256)
"""Of a picture in pixels: 64 to 256 visual tokens."""
PAIR_SIDES = (128, 144, 160, 176)
SIGN_HEIGHTS = (16, 20, 26)
_SEED = 14
"""Sets these scenes apart from the testbed's."""


def draw(rng: np.random.Generator, width: int, height: int, *, few: bool = False) -> Scene:
    """A scene with words of several sizes; with ``few``, as many things as a caption names."""
    return draw_scene(rng, width, height, most=4 if few else None, sign_heights=SIGN_HEIGHTS)


def ask_in_english(rng: np.random.Generator, scenes: Sequence[Scene], kind: str) -> Question | None:
    """One question of a kind, or None where the scenes have none."""
    if kind == "pair":
        question = ask_pair(rng, (scenes[0], scenes[1]))
    elif kind in MAKERS:
        return MAKERS[kind](rng, scenes[0])
    else:
        question = ask(rng, scenes[0], "lookup" if kind == "text" else kind)
    return in_english(rng, question, scenes[question.picture]) if question else None


def sample(split: str, index: int, *, kinds: Sequence[str] = KINDS) -> Sample:
    """The sample with this index; its scenes belong to no other sample and no other split."""
    rng = np.random.default_rng((_SEED, SPLITS[split], index))
    kind = kinds[index % len(kinds)]
    sides = PAIR_SIDES if kind == "pair" else SIDES
    while True:
        scenes = tuple(
            draw(rng, int(rng.choice(sides)), int(rng.choice(sides)), few=kind == "caption")
            for _ in range(2 if kind == "pair" else 1)
        )
        if question := ask_in_english(rng, scenes, kind):
            break
    shown = () if kind == "text" else scenes
    images = [render(scene, partial(backdrop, split)) for scene in shown]
    scene = scenes[question.picture]
    boxes = [scene.things[i].box for i in question.decisive] + [scene.signs[i].box for i in question.signs]
    evidence = [(question.picture, *box) for box in boxes]
    return Sample(images, question.text, question.answer, kind, split, index, evidence, shown)


def samples(split: str, n: int, *, kinds: Sequence[str] = KINDS) -> Iterator[Sample]:
    """The first ``n`` samples of a split, lazily; kinds take turns."""
    for index in range(n):
        yield sample(split, index, kinds=kinds)


@dataclass
class Lesson:
    """One step's pictures and questions."""

    scenes: list[Scene]
    pixels: torch.Tensor
    grids: torch.Tensor
    batch: Batch


@dataclass
class Look:
    """Pictures without questions; ``labels`` are those of all tokens, ``[tokens, groups]``."""

    scenes: list[Scene]
    pixels: torch.Tensor
    grids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Task:
    """What a step teaches: how many pictures, questions behind each, kinds (hard ones more often), and sizes."""

    pictures: int = 1
    slots: int = 10
    kinds: tuple[str, ...] = (
        "colour", "shape", "glyph", "word", "lookup", "caption", "inventory",
        *("number", "compare", "relation", "two_hop") * 2, *("exist",) * 3, *("count",) * 4,
    )  # fmt: skip
    most_in_caption: int = 8
    """Things that a lesson's caption may name: every token of it is an answer, so it teaches more than it costs."""
    sides: tuple[int, ...] = SIDES
    pairs: float = 0.12
    text: float = 0.04


class Looks(Dataset[Look]):
    """Steps of the tower alone, by number: scenes of one size, their patches and what each token shows."""

    def __init__(self, *, pixels: int, seed: int, steps: int, split: str = "train") -> None:
        self.pixels, self.seed, self.steps, self.split = pixels, seed, steps, split

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Look:
        rng = np.random.default_rng((_SEED, SPLITS[self.split], 1, self.seed, step))
        width, height = (int(side) for side in rng.choice(SIDES, 2))
        scenes = [draw(rng, width, height) for _ in range(max(4, self.pixels // (width * height)))]
        pictures = [render(scene, partial(backdrop, self.split)) for scene in scenes]
        return Look(scenes, patches(pictures), scene_grids(scenes), batch_labels(scenes))


class Lessons(Dataset[Lesson]):
    """Steps by number, each drawn from its own seed, so that a run that was stopped goes on as it would have.

    Parameters
    ----------
    prompts : Prompts
    task : Task
    seed, steps : int
    split : str
        Whose photographs and seeds.
    """

    def __init__(self, prompts: Prompts, task: Task, *, seed: int, steps: int, split: str = "train") -> None:
        self.prompts, self.task, self.seed, self.steps, self.split = prompts, task, seed, steps, split

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Lesson:
        rng = np.random.default_rng((_SEED, SPLITS[self.split], 0, self.seed, step))
        chance = rng.random()
        pair, text = chance < self.task.pairs, chance > 1 - self.task.text
        sides = [side for side in self.task.sides if not pair or side in PAIR_SIDES] or list(PAIR_SIDES[:1])
        width, height = (int(side) for side in rng.choice(sides, 2))
        packed: list[Packed] = []
        kinds: list[list[str]] = []
        shown: list[Scene] = []
        while len(packed) < max(1, self.task.pictures * 2 // 3 if pair else self.task.pictures):
            few = bool(rng.random() < 0.3)
            scenes = [draw(rng, width, height, few=few) for _ in range(2 if pair else 1)]
            if questions := self._questions(rng, scenes, pair, text):
                seen = [] if text else scenes
                grids = [(scene.height // CELL, scene.width // CELL) for scene in seen]
                packed.append(self.prompts.pack(grids, questions))
                kinds.append([question.kind if not text else "text" for question in questions])
                shown += seen
        pictures = [render(scene, partial(backdrop, self.split)) for scene in shown]
        pixels = patches(pictures) if pictures else torch.zeros(0)
        batch = collate(packed, kinds)
        return Lesson(shown, pixels, scene_grids(shown), replace(batch, mask=batch.mask == 0))

    def _questions(self, rng: np.random.Generator, scenes: list[Scene], pair: bool, text: bool) -> list[Question]:
        """As many different questions as there are slots."""
        found: dict[str, Question] = {}
        if not pair and not text and "caption" in self.task.kinds:
            said = caption(rng, scenes[0], self.task.most_in_caption)
            found |= {said.text: said} if said else {}
        for _ in range(4 * self.task.slots):
            if len(found) == self.task.slots:
                break
            kind = "pair" if pair else "text" if text else str(rng.choice(self.task.kinds))
            if kind != "caption" and (question := ask_in_english(rng, scenes, kind)):
                found.setdefault(question.text, question)
        return list(found.values())
