"""Prompts and budgets at the edge of what makes sense, from a real prefill through bytes to an answer."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from kvferry.cache import Role
from kvferry.errors import BudgetError, EvidenceError, InputError
from kvferry.evidence import Evidence
from kvferry.models import VLM
from kvferry.recipe import Recipe, compress, decompress
from kvferry.selection import BUDGETS, POLICIES, SCORERS
from tests.helpers import cache as random_cache

QUESTION = "what colour is the circle ?"
RANKERS = [name for name in SCORERS if name not in ("full", "none")]
PER_HEAD = "snapkv"
WAYS = [
    *(f"{name}@{{}}" for name in RANKERS),
    *(f"{PER_HEAD}@{{}},budget={name}" for name in BUDGETS if name != "uniform"),
    *(f"knorm@{{}},modality={name}" for name in ("uniform", "adaptive", "adaptive:0.5")),
]
"""Every scorer, budget and policy that has no least size, waiting for a fraction."""
GUARDED = [f"knorm@{{}},modality={name}" for name in ("text_preserving", "visual_heavy", "skip_visual:0")]
WATCHING = [way for way in (*WAYS, *GUARDED) if Recipe.parse(way.format(0.5)).requests]


@pytest.mark.parametrize("way", WATCHING)
def test_evidence_that_was_not_gathered_is_named(vlm: VLM, picture: Image.Image, way: str) -> None:
    recipe = Recipe.parse(way.format(0.5))
    with pytest.raises(EvidenceError, match="bare cache"):
        recipe.select(vlm.prefill([picture], QUESTION).cache)
    with pytest.raises(EvidenceError, match=r"not observed.* pass the recipe to prefill"):
        recipe.select(vlm.prefill([picture], QUESTION, recipe="knorm@0.5"))
    missing = vlm.prefill([picture], QUESTION, recipe=recipe)
    for request in recipe.requests:
        less = {k: v for k, v in missing.evidence.column_sums.items() if k != request}
        with pytest.raises(EvidenceError, match=f"{request.rows!r} rows was not observed"):
            recipe.select(replace(missing, evidence=Evidence(less)))


@pytest.mark.parametrize("way", WATCHING)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_evidence_that_overflowed_is_named(vlm: VLM, picture: Image.Image, way: str, broken: float) -> None:
    recipe = Recipe.parse(way.format(0.5))
    seen = vlm.prefill([picture], QUESTION, recipe=recipe)
    for observed in seen.evidence.column_sums.values():
        last = max(observed)
        observed[last] = observed[last].clone()
        observed[last].view(-1)[-1] = broken
    with pytest.raises(EvidenceError, match=r"NaN or infinity.*bfloat16"):
        recipe.select(seen)


@pytest.mark.parametrize("way", WAYS)
def test_one_token_is_enough_to_go_on(vlm: VLM, picture: Image.Image, way: str) -> None:
    recipe = Recipe.parse(f"{way.format(0.001)}|int4|zstd")
    seen = vlm.prefill([picture], QUESTION, recipe=recipe)
    small = decompress(compress(seen, recipe))
    assert {x for layer in small for x in layer.per_head} == {1}
    assert {int(x) for layer in small for x in layer.positions.view(-1)} == {0}
    assert isinstance(vlm.answer(small, max_new_tokens=2), str)


@pytest.mark.parametrize("way", [*WAYS, *GUARDED])
def test_everything_is_the_identity(vlm: VLM, picture: Image.Image, way: str) -> None:
    recipe = Recipe.parse(way.format(1))
    seen = vlm.prefill([picture], QUESTION, recipe=recipe)
    same = recipe.keep(seen)
    for before, after in zip(seen.cache, same, strict=True):
        for name in (f.name for f in fields(before)):
            one, other = getattr(before, name), getattr(after, name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert vlm.answer(same, max_new_tokens=3) == vlm.answer(seen.cache, max_new_tokens=3)


@pytest.mark.parametrize("policy", ["text_preserving", "visual_heavy", "visual_heavy:0.4", "skip_visual:1"])
def test_too_little_for_what_must_stay(vlm: VLM, picture: Image.Image, policy: str) -> None:
    recipe = "snapkv@{},modality=" + policy
    seen = vlm.prefill([picture], QUESTION, recipe=recipe.format(0.5))
    with pytest.raises(BudgetError, match="the smallest fraction that works for this prompt is 0") as error:
        compress(seen, recipe.format(0.001))
    smallest = float(str(error.value).split()[-1])
    compress(seen, recipe.format(smallest))
    with pytest.raises(BudgetError):
        compress(seen, recipe.format(smallest - 1 / seen.cache.length))


@pytest.mark.parametrize("recipe", ["q2c@0.5", "q2c@0.5,layers=all", "knorm@0.5,modality=skip_visual:0.5"])
def test_a_prompt_without_a_question(vlm: VLM, picture: Image.Image, recipe: str) -> None:
    with pytest.raises(EvidenceError, match=r"no 'question' rows.*proxy_question"):
        vlm.prefill([picture], recipe=recipe)
    seen = vlm.prefill([picture], recipe=recipe, proxy_question=QUESTION)
    assert vlm.answer(decompress(compress(seen, recipe)), QUESTION, max_new_tokens=2) is not None


def test_a_question_that_nobody_marked(vlm: VLM, picture: Image.Image) -> None:
    """Evidence of a question, but a layout that knows none: ``q2c`` then protects no tail."""
    seen = vlm.prefill([picture], QUESTION, recipe="q2c@0.25")
    layout = seen.cache.layout
    unmarked = np.where(layout.question, np.uint8(Role.SPECIAL), layout.role)
    bare = replace(seen, cache=replace(seen.cache, layout=replace(layout, role=unmarked)))
    kept = Recipe.parse("q2c@0.25").select(bare)
    assert kept.positions[0].shape[1] == round(0.25 * seen.cache.length)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("scorer", RANKERS)
def test_without_a_picture_a_visual_policy_is_uniform(vlm: VLM, name: str, scorer: str) -> None:
    question = "note says the circle is red . what colour is the circle ?"
    plain, recipe = f"{scorer}@0.4", f"{scorer}@0.4,modality={name}"
    chosen = [Recipe.parse(r).select(vlm.prefill(question=question, recipe=r)) for r in (plain, recipe)]
    assert all(torch.equal(a, b) for a, b in zip(chosen[0].positions, chosen[1].positions, strict=True))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_a_cache_that_overflowed_is_not_sent(broken: float, part: str, codec: str) -> None:
    cache = random_cache()
    getattr(cache.layers[1], part)[0, 3, 2] = broken
    with pytest.raises(InputError, match=f"the {part} of layer 1"):
        compress(cache, f"full|{codec}")


@pytest.mark.parametrize(("scorer", "part"), [("knorm", "keys"), ("keydiff", "keys"), ("value_norm", "values")])
def test_scores_that_are_no_numbers(scorer: str, part: str) -> None:
    cache = random_cache()
    getattr(cache.layers[1], part)[0, 3, 2] = torch.nan
    with pytest.raises(EvidenceError, match="layer 1 hold NaN"):
        compress(cache, f"{scorer}@0.5|bf16")
