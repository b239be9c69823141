"""Ten questions about one scene, one after another, on a cache that was compressed for the first of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvferry.errors import InputError
from kvferry.testbed.data import SPLITS, Sample, exact_match, sample
from kvferry.testbed.questions import MAKERS, Question, ask
from study.long_runs import Plan, Record, answer_ids, carried, forced, says

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM

TURNS = 10
MAX_NEW_TOKENS = 12
ATTEMPTS = 400
_ORDER = 10
"""Sets the seeds of further questions apart from those of scenes."""


def run(vlm: VLM, plan: Plan, index: int) -> Record:
    """One conversation by every recipe.

    Returns
    -------
    dict
        ``kinds`` of the questions; ``bytes`` by recipe; ``turns``: whether each answer was right, the model's own
        answers before it being in the context; ``alone``: the same where each question is asked on its own on the
        scene's cache, compressed with the first question as its guide (of the full cache: the fresh question).
    """
    drawn, questions = conversation(plan.split, index, TURNS)
    first = questions[0].text
    caches, sizes = carried(vlm, drawn.images, first, plan.recipes)
    scenes, _ = carried(vlm, drawn.images, first, plan.recipes, scene=True)
    alone: dict[str, list[int]] = {recipe: [] for recipe in plan.recipes}
    for question in questions:
        truth = answer_ids(vlm, question.answer)
        for recipe, logits in forced(vlm, scenes, truth, question.text).items():
            alone[recipe].append(int(says(vlm, logits, truth)))
    return {
        "kinds": [question.kind for question in questions],
        "bytes": sizes,
        "turns": {recipe: _converse(vlm, caches[recipe], questions) for recipe in plan.recipes},
        "alone": alone,
    }


def conversation(split: str, index: int, count: int) -> tuple[Sample, list[Question]]:
    """A scene of the split and ``count`` different questions about it, of all kinds, in an order drawn at random."""
    drawn = sample(split, index, kinds=tuple(MAKERS))
    (scene,) = drawn.scenes
    rng = np.random.default_rng((SPLITS[split], index, _ORDER))
    found: dict[str, Question] = {}
    for _ in range(ATTEMPTS):
        question = ask(rng, scene, str(rng.choice(list(MAKERS))))
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            questions = list(found.values())
            return drawn, [questions[i] for i in rng.permutation(count)]
    raise InputError(f"scene {index} of {split} has no {count} different questions; ask fewer")


def _converse(vlm: VLM, cache: KVCache, questions: list[Question]) -> list[int]:
    """Whether each answer is right; the first question is in the cache."""
    right, asked = [], None
    for question in questions:
        done = vlm.resume(cache, asked and question.text, max_new_tokens=MAX_NEW_TOKENS, keep=True)
        right.append(int(exact_match(done.text, question.answer)))
        assert done.cache is not None
        cache, asked = done.cache, question.text
    return right
