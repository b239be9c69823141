"""What is seldom seen: attributes that one training scene in a hundred shows, and things that stand out in a scene."""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from kvferry.evaluate.divergence import divergence
from kvferry.testbed.data import SPLITS, draw_question, sample
from kvferry.testbed.questions import Question
from kvferry.testbed.scenes import Scene
from kvferry.testbed.words import RARE_COLOURS, RARE_SHAPES
from study.long_runs import FULL, Plan, Record, answer_ids, carried, forced, says

if TYPE_CHECKING:
    from kvferry.models import VLM

KINDS = ("colour", "shape", "glyph", "exist", "relation", "compare")
"""Kinds that name or ask for colours and shapes of things."""
RARE = frozenset((*RARE_COLOURS, *RARE_SHAPES))


def indices(plan: Plan) -> list[int]:
    """The first ``n`` questions of the split that turn on something rare, and twice as many others of the same kinds.

    Of each kind there are as many others for every rare one, so that both groups ask alike.
    """
    rare: list[int] = []
    others: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for index in count():
        scene, question = _drawn(plan.split, index)
        if turns_on_rare(scene, question):
            rare.append(index)
        elif len(others[question.kind]) < 2 * plan.n:
            others[question.kind].append(index)
        if len(rare) == plan.n:
            break
    wanted = Counter(KINDS[index % len(KINDS)] for index in rare)
    return sorted(rare + [i for kind, each in others.items() for i in each[: 2 * wanted[kind]]])


def turns_on_rare(scene: Scene, question: Question) -> bool:
    """Whether a thing that the question names or that decides it has a rare colour or shape."""
    things = [scene.things[i] for i in (*question.named, *question.decisive)]
    return any({thing.colour, thing.shape} & RARE for thing in things)


def run(vlm: VLM, plan: Plan, index: int) -> Record:
    """One question by every recipe.

    Returns
    -------
    dict
        ``rare``; of questions that one thing decides: its ``level`` (0 small to 2 large) and how many things of the
        scene are ``alike`` (of its colour, itself included); ``bytes``; ``right`` and ``kl`` by recipe.
    """
    scene, question = _drawn(plan.split, index)
    drawn = sample(plan.split, index, kinds=KINDS)
    caches, sizes = carried(vlm, drawn.images, drawn.question, plan.recipes)
    truth = answer_ids(vlm, drawn.answer)
    logits = forced(vlm, caches, truth)
    one = scene.things[question.decisive[0]] if len(set(question.decisive)) == 1 else None
    return {
        "kind": drawn.kind,
        "rare": turns_on_rare(scene, question),
        "level": one and one.level,
        "alike": one and sum(thing.colour == one.colour for thing in scene.things),
        "bytes": sizes,
        "right": {recipe: int(says(vlm, logits[recipe], truth)) for recipe in plan.recipes},
        "kl": {recipe: round(divergence(logits[FULL], logits[recipe]), 6) for recipe in plan.recipes},
    }


def frequencies(n: int, split: str = "train") -> dict[str, Counter[str]]:
    """In how many of ``n`` training questions' scenes each colour, shape, glyph and word appears."""
    found: dict[str, Counter[str]] = {name: Counter() for name in ("colour", "shape", "glyph", "word")}
    for index in range(n):
        scene, _ = _drawn(split, index)
        found["colour"].update({thing.colour for thing in scene.things})
        found["shape"].update({thing.shape for thing in scene.things})
        found["glyph"].update({thing.glyph for thing in scene.things if thing.glyph})
        found["word"].update({sign.word for sign in scene.signs})
    return found


def _drawn(split: str, index: int) -> tuple[Scene, Question]:
    """Scene and question of a sample without its picture."""
    scenes, question = draw_question(np.random.default_rng((SPLITS[split], index)), KINDS[index % len(KINDS)])
    return scenes[0], question
