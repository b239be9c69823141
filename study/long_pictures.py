"""Two and three pictures in one prompt, and a question about one of them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvferry.evaluate.divergence import divergence
from kvferry.testbed.data import PAIR_SIDES, SPLITS, sample
from kvferry.testbed.render import render
from kvferry.testbed.scenes import draw_scene
from study.long_runs import FULL, Plan, Record, answer_ids, carried, forced, says

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM

_THIRD = 3
"""Sets the seeds of third pictures apart."""


def run(vlm: VLM, plan: Plan, index: int) -> Record:
    """One question about the first or the second picture, with two pictures and with a third behind them.

    Returns
    -------
    dict
        ``picture`` asked about (0 or 1) and ``bytes``; and under ``2`` and ``3`` (pictures) by recipe: ``right``,
        ``agree`` (all tokens of the answer and its end are the full cache's most likely ones), ``kl`` (nats a token)
        and ``kept``, the share of each picture's tokens that is kept, a mean over heads and layers.
    """
    drawn = sample(plan.split, index, kinds=("pair",))
    rng = np.random.default_rng((SPLITS[plan.split], index, _THIRD))
    third = render(draw_scene(rng, int(rng.choice(PAIR_SIDES)), int(rng.choice(PAIR_SIDES))))
    picture = 0 if "first" in drawn.question else 1
    record: Record = {"picture": picture, "bytes": {}}
    truth = answer_ids(vlm, drawn.answer)
    for pictures in (drawn.images, [*drawn.images, third]):
        caches, sizes = carried(vlm, pictures, drawn.question, plan.recipes)
        logits = forced(vlm, caches, truth)
        said = logits[FULL].argmax(-1).tolist()
        count = str(len(pictures))
        record["bytes"][count] = sizes
        record[count] = {
            recipe: {
                "right": int(says(vlm, logits[recipe], truth)),
                "agree": int(logits[recipe].argmax(-1).tolist() == said),
                "kl": round(divergence(logits[FULL], logits[recipe]), 6),
                "kept": kept_by_picture(caches[recipe]),
            }
            for recipe in plan.recipes
        }
    return record


def kept_by_picture(cache: KVCache) -> list[float]:
    """The share of each picture's visual tokens that a head keeps, a mean over heads and layers."""
    visual = cache.layout.visual.astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], visual, [0]])))
    runs = list(pairwise(edges))[::2]
    counts = np.zeros(len(cache.layout))
    heads = 0
    for layer in cache:
        counts += np.bincount(layer.positions.flatten().numpy(), minlength=len(counts))
        heads += layer.heads
    return [round(float(counts[a:b].sum() / (heads * (b - a))), 5) for a, b in runs]
