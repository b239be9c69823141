"""What each modality is owed, in prompts of every shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from kvferry.cache import KVCache, Modality, PromptLayout, Role
from kvferry.errors import BudgetError, FingerprintError, InputError, RecipeError
from kvferry.evidence import Evidence, Prefilled
from kvferry.models.fingerprint import folder_fingerprint
from kvferry.models.load import find_folder
from kvferry.recipe import Recipe
from kvferry.selection import Selection, kept_count
from kvferry.selection.modality import visual_mass
from kvferry.selection.modality.skip_visual import SHIPPED
from tests.helpers import cache as random_cache
from tests.helpers import layout

TEXT, IMAGE, VIDEO = Modality.TEXT, Modality.IMAGE, Modality.VIDEO
SHAPES = {
    "one picture": [(TEXT, 3), (IMAGE, 40), (TEXT, 9)],
    "two pictures": [(TEXT, 2), (IMAGE, 20), (TEXT, 5), (IMAGE, 30), (TEXT, 6)],
    "interleaved from the first token": [(IMAGE, 9), (TEXT, 3), (IMAGE, 9), (TEXT, 3), (IMAGE, 9), (TEXT, 8)],
    "a film": [(TEXT, 5), *[(VIDEO, 8), (TEXT, 2)] * 4, (TEXT, 6)],
    "turns, a picture and a film": [(TEXT, 4), (IMAGE, 16), (TEXT, 12), (VIDEO, 20), (TEXT, 9)],
    "only pictures": [(IMAGE, 30)],
}
POLICIES = [
    "uniform", "visual_heavy", "visual_heavy:0.3", "visual_heavy:0", "text_preserving", "adaptive", "adaptive:0.5",
]  # fmt: skip


def fingerprint_of_shipped(name: str) -> str:
    folder = find_folder(name)
    return folder_fingerprint(folder, AutoConfig.from_pretrained(folder))


def prompt(shape: list[tuple[Modality, int]]) -> PromptLayout:
    modality = np.concatenate([np.full(count, kind, np.uint8) for kind, count in [*shape, (TEXT, 1)]])
    n = len(modality)
    role = np.where(np.arange(n) >= n - 6, Role.QUESTION, Role.CONTEXT).astype(np.uint8)
    return PromptLayout(np.arange(n, dtype=np.int32), modality, role, np.arange(n, dtype=np.int32)[None])


def sums(cache: KVCache, recipe: str, seed: int = 0) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    layers = {i: torch.rand(2, cache.length, generator=generator) for i in range(len(cache.layers))}
    return Evidence(dict.fromkeys(Recipe.parse(recipe).requests, layers))


def select(recipe: str, cache: KVCache, seed: int = 0) -> Selection:
    return Recipe.parse(recipe).select(Prefilled(cache, sums(cache, recipe, seed), torch.empty(0)))


def split(cache: KVCache, selection: Selection) -> list[tuple[int, int]]:
    """Text and visual tokens that each head keeps."""
    visual = torch.from_numpy(cache.layout.visual)
    kept = [visual[head[0]] for i in range(len(cache.layers)) for head in selection.heads(i)]
    return [(int((~x).sum()), int(x.sum())) for x in kept]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", POLICIES)
@given(st.floats(0.05, 1.0), st.integers(0, 9), st.sampled_from(["", ",budget=head", ",budget=pyramid:3"]))
def test_policies_meet_the_budget_and_their_word(
    policy: str, shape: str, fraction: float, seed: int, budget: str
) -> None:
    cache = random_cache(prompt(SHAPES[shape]), seed=seed)
    pictures = int(cache.layout.visual[: cache.length].sum())
    text = cache.length - pictures
    recipe = f"knorm@{fraction},modality={policy}{budget}"
    try:
        selection = select(recipe, cache, seed)
    except BudgetError as error:
        works = float(str(error).split()[-1])
        assert works > fraction - 0.5 / cache.length
        select(f"knorm@{works},modality={policy}{budget}", cache, seed)
        return
    plain = select(f"knorm@{fraction}{budget}", cache, seed)
    assert sum(map(sum, split(cache, selection))) == sum(map(sum, split(cache, plain)))
    for words, kept in split(cache, selection):
        sinks = int((~cache.layout.visual[: min(4, words + kept)]).sum())
        if policy == "text_preserving":
            assert words == text
        elif policy == "adaptive":
            assert budget or min(words, text) >= min(text, (words + kept) // 4)
            assert budget or kept >= min(pictures, (words + kept) // 4) - 1
        elif policy.startswith("visual_heavy"):
            share = float(policy.partition(":")[2] or 0.8)
            fixed = max(int(share * text + 0.5), sinks)
            assert words == fixed or kept == pictures or budget == ",budget=head"


def test_visual_heavy_is_exact() -> None:
    cache = random_cache(prompt(SHAPES["one picture"]))
    assert set(split(cache, select("knorm@0.5,modality=visual_heavy:0.5", cache))) == {(6, 20)}
    assert set(split(cache, select("knorm@0.5,modality=visual_heavy:1", cache))) == {(12, 14)}
    assert set(split(cache, select("knorm@0.96,modality=visual_heavy:0.5", cache))) == {(10, 40)}
    assert set(split(cache, select("knorm@0.25,modality=text_preserving", cache))) == {(12, 1)}


def test_a_guarantee_goes_to_the_best_of_its_modality() -> None:
    cache = random_cache(prompt(SHAPES["one picture"]), layers=1)
    scores = -cache.layers[0].keys.float().norm(dim=-1)
    (head, _) = select("knorm@0.4,modality=text_preserving", cache).heads(0)
    assert set(head[0].tolist()) >= {0, 1, 2, 3, *range(43, 52)}
    kept = [x for x in head[0].tolist() if 3 < x < 43]  # token 3 stays as a sink
    assert set(kept) == set((scores[0, 4:43].topk(len(kept)).indices + 4).tolist())


def test_too_small_a_budget_names_the_smallest_that_works() -> None:
    cache = random_cache(prompt(SHAPES["two pictures"]))
    with pytest.raises(BudgetError, match=r"6 of 63 tokens per layer are too few for the 15 .* is 0\.239") as error:
        select("knorm@0.1,modality=text_preserving", cache)
    works = str(error.value).split()[-1]
    assert {x[0] for x in split(cache, select(f"knorm@{works},modality=text_preserving", cache))} == {13}


@pytest.mark.parametrize("policy", [*POLICIES, "skip_visual:1"])
def test_without_pictures_every_policy_is_uniform(policy: str) -> None:
    cache = random_cache(layout(rows=0, columns=0, question=30))
    assert not cache.layout.visual.any()
    ours, plain = select(f"knorm@0.3,modality={policy}", cache), select("knorm@0.3", cache)
    assert all(torch.equal(a, b) for a, b in zip(ours.positions, plain.positions, strict=True))
    assert ours.positions[0].shape[1] == kept_count(0.3, cache.length)


@pytest.mark.parametrize("recipe", ["vlcache@0.8", "snapkv@0.8,window=14", "q2c@0.8", "h2o@0.8"])
def test_of_a_texts_end_the_last_tokens_stay(recipe: str) -> None:
    cache = random_cache(layout(text_before=6, rows=6, columns=10, question=4, tail=11))
    for i in range(3):
        (head,) = select(f"{recipe},modality=visual_heavy:0.4", cache).heads(i)[0]
        text = [x for x in head.tolist() if not cache.layout.visual[x]]
        assert text == [0, 1, 2, 3, 76, 77, 78, 79]


def test_skip_visual_drops_the_picture_below_its_threshold() -> None:
    cache = random_cache(prompt(SHAPES["turns, a picture and a film"]))
    mass = visual_mass(cache, sums(cache, "knorm@0.5,modality=skip_visual"))
    assert 0.4 < mass < 0.8
    looks = select(f"knorm@0.6,modality=skip_visual:{mass - 1e-6}", cache)
    text = int((~cache.layout.visual[: cache.length]).sum())
    assert set(split(cache, looks)) == {(text, kept_count(0.6, cache.length) - text)}
    skips = select(f"knorm@0.6,modality=skip_visual:{mass + 1e-6}", cache)
    assert set(split(cache, skips)) == {(text, 0)}
    with pytest.raises(BudgetError):
        select("knorm@0.1,modality=skip_visual:1", cache)


def test_skip_visual_takes_the_profile_that_ships_with_the_model() -> None:
    cache = random_cache(prompt(SHAPES["one picture"]))
    recipe = "knorm@0.6,modality=skip_visual"
    with pytest.raises(InputError, match=r"calibrate-skip MODEL .*skip_visual:0\.5"):
        select(recipe, cache)
    with pytest.raises(InputError, match="calibrate-skip MODEL"):
        select(recipe, replace(cache, fingerprint=""))
    for name in ("cloud", "edge"):
        profile = json.loads((SHIPPED[0] / name / "skip_visual.json").read_text())
        shipped = replace(cache, fingerprint=profile["fingerprint"])
        said = select(f"knorm@0.6,modality=skip_visual:{profile['threshold']}", cache)
        found = select(recipe, shipped)
        assert all(torch.equal(a, b) for a, b in zip(found.positions, said.positions, strict=True))
        assert fingerprint_of_shipped(f"testbed/{name}") == profile["fingerprint"]


def test_visual_mass_by_hand() -> None:
    cache = random_cache(prompt([(TEXT, 1), (IMAGE, 2), (TEXT, 1)]), layers=2)
    columns = torch.tensor([[1.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    request = Recipe.parse("knorm@0.5,modality=skip_visual").requests[0]
    evidence = Evidence({request: {0: columns, 1: columns.flip(0)}})
    assert visual_mass(cache, evidence) == pytest.approx((3 / 4 + 0) / 2)


def test_a_profile_belongs_to_its_model(tmp_path: Path) -> None:
    cache = random_cache(prompt(SHAPES["one picture"]))
    path = tmp_path / "profile.json"
    recipe = f"knorm@0.6,modality=skip_visual@{path}"
    assert str(Recipe.parse(recipe)) == recipe + "|bf16"
    with pytest.raises(InputError, match="calibrate-skip"):
        select(recipe, cache)
    path.write_text(json.dumps({"threshold": 1.0, "fingerprint": cache.fingerprint}))
    assert all(kept == 0 for _, kept in split(cache, select(recipe, cache)))
    with pytest.raises(FingerprintError, match="another model"):
        select(recipe, replace(cache, fingerprint="cd" * 32))
    with pytest.raises(InputError, match="skip_visual:1"):
        select(recipe, replace(cache, fingerprint=""))


@pytest.mark.parametrize(
    "wrong", ["visual_heavy:1.1", "visual_heavy:nan", "adaptive:0.6", "adaptive:-1", "skip_visual:2", "skip_visual:nan"]
)
def test_arguments_out_of_range(wrong: str) -> None:
    with pytest.raises(RecipeError, match=f"modality={wrong.split(':')[0]}"):
        Recipe.parse(f"knorm@0.5,modality={wrong}")
