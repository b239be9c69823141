"""Two hundred tokens on top of a compressed cache: how long its model goes on saying what the full cache's would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvferry.models.resume import continue_from
from study.long_runs import FULL, Plan, Record, answer_ids, carried, forced
from study.long_turns import conversation

if TYPE_CHECKING:
    from kvferry.models import VLM

BUCKETS = ((0, 10), (10, 50), (50, 100), (100, 200))
"""First and last position (exclusive) of what is averaged together."""
TOKENS = BUCKETS[-1][1]
TURNS = 24
"""Questions drawn: enough for more than :data:`TOKENS` tokens of questions and answers."""


def run(vlm: VLM, plan: Plan, index: int) -> Record:
    """One scene by every recipe, on three texts that all caches are made to read (teacher forcing).

    Returns
    -------
    dict
        ``bytes`` by recipe, and for ``dialogue`` (questions about the scene with their true answers, the first of which
        every cache holds), ``answers`` (those positions of it that say an answer or end one) and ``free`` (the full
        cache's own greedy text, whose end tokens end nothing): by recipe, for each of :data:`BUCKETS`, the share of
        positions whose most likely token is the full cache's, and the mean ``KL(full || recipe)`` in nats.
    """
    drawn, questions = conversation(plan.split, index, TURNS)
    caches, sizes = carried(vlm, drawn.images, questions[0].text, plan.recipes)
    ids = answer_ids(vlm, questions[0].answer)
    answers = list(range(len(ids) + 1))
    for question in questions[1:]:
        ids += vlm.turn_ids(question.text)
        truth = answer_ids(vlm, question.answer)
        answers += range(len(ids), len(ids) + len(truth) + 1)
        ids += truth
    free = continue_from(vlm.model, caches[FULL], max_new_tokens=TOKENS, stop=()).token_ids
    everywhere = range(TOKENS)
    dialogue = forced(vlm, caches, ids[:TOKENS])
    return {
        "bytes": sizes,
        "dialogue": _distance(dialogue, everywhere),
        "answers": _distance(dialogue, answers),
        "free": _distance(forced(vlm, caches, free), everywhere),
    }


def _distance(logits: dict[str, torch.Tensor], places: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
    """Of every recipe to the full cache, over the ``places`` in each bucket."""
    buckets = [[place for place in places if first <= place < last] for first, last in BUCKETS]
    full = logits[FULL].double().log_softmax(-1)
    found = {}
    for recipe, other in logits.items():
        mine = other.double().log_softmax(-1)
        agree = (mine.argmax(-1) == full.argmax(-1)).double()
        kl = (full.exp() * (full - mine)).sum(-1).clamp(min=0)
        found[recipe] = [(round(float(agree[x].mean()), 4), round(float(kl[x].mean()), 5)) for x in buckets]
    return found
