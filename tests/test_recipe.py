"""Recipes as text, and what they do to a cache."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvferry.codecs import CODECS, Integer
from kvferry.errors import EvidenceError, InputError, RecipeError
from kvferry.evidence import Evidence, Prefilled
from kvferry.recipe import Recipe, compress, compress_frames, decompress
from kvferry.selection import Q2C, KNorm, Random, SnapKV, kept_count
from tests.helpers import cache

RECIPES = ["full", "none|int4", "q2c@0.5|int8", "snapkv@0.25|int3|zstd", "knorm@0.3|bf16", "random@0.1,seed=7|int2"]


def prefilled(recipe: str) -> Prefilled:
    full = cache()
    generator = torch.Generator().manual_seed(1)
    sums = {
        request: {i: torch.rand(2, full.length, generator=generator) for i in range(len(full.layers))}
        for request in Recipe.parse(recipe).requests
    }
    return Prefilled(full, Evidence(sums), torch.zeros(1))


fractions = st.floats(0, 1, exclude_min=True)
codecs = st.sampled_from(list(CODECS.values()))
stages = st.sampled_from([None, "zstd"])
scorers = st.one_of(
    st.builds(Q2C, layers=st.sampled_from(["last", "all"])),
    st.builds(
        SnapKV, window=st.integers(1, 99), kernel=st.sampled_from([1, 5, 7]), pool=st.sampled_from(["avg", "max"])
    ),
    st.builds(KNorm),
    st.builds(Random, seed=st.integers(0, 2**40)),
)


@settings(deadline=None)
@given(st.builds(Recipe, scorers, fractions, codecs, stages))
def test_canonical_text_reads_back(recipe: Recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe
    assert str(Recipe.parse(str(recipe))) == str(recipe)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("full", "full|bf16"),
        (" q2c @ 0.50 | int8 ", "q2c@0.5|int8"),
        ("q2c@1|int8", "q2c@1|int8"),
        ("snapkv@0.25,pool=max,window=16|int4| zstd", "snapkv@0.25,window=16,pool=max|int4|zstd"),
        ("snapkv@0.25,window=32|bf16", "snapkv@0.25|bf16"),
        ("random@.1, seed = 0", "random@0.1|bf16"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert str(Recipe.parse(text)) == canonical


def test_options_take_the_types_of_the_fields() -> None:
    assert Recipe.parse("snapkv@0.25,window=16,pool=max|int4") == Recipe(
        SnapKV(window=16, pool="max"), 0.25, Integer(4)
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("q3c@0.5", "did you mean 'q2c'"),
        ("xyz@0.5", "choose from expected_attention, full"),
        ("q2c@0.5|int9", "did you mean"),
        ("q2c@0.5|int8|gzip", "lossless stage 'gzip'"),
        ("q2c@0.5|int8|zstd|zstd", "not a recipe"),
        ("q2c@0.5||int8", "not a recipe"),
        ("", "not a recipe"),
        ("q2c", "needs the fraction"),
        ("q2c@", "a number in"),
        ("q2c@half", "a number in"),
        ("q2c@0", r"\(0, 1\]"),
        ("q2c@1.5", r"\(0, 1\]"),
        ("q2c@-0.1", r"\(0, 1\]"),
        ("q2c@nan", r"\(0, 1\]"),
        ("q2c@inf", r"\(0, 1\]"),
        ("full@0.5", "takes no fraction"),
        ("none@1", "takes no fraction"),
        ("snapkv@0.5,windw=3", "did you mean 'window'"),
        ("snapkv@0.5,window=three", "type int"),
        ("snapkv@0.5,window", "key=value"),
        ("snapkv@0.5,pool=mux", "did you mean 'max'"),
        ("snapkv@0.5,window=3,window=4", "twice"),
        ("snapkv@0.5,kernel=2", "odd"),
        ("knorm@0.5,window=3", "no options"),
    ],
)
def test_mistakes_are_named(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.parse(text)


def test_a_recipe_that_is_built_wrongly() -> None:
    with pytest.raises(RecipeError, match="takes no fraction"):
        replace(Recipe.parse("full"), fraction=0.5)
    with pytest.raises(RecipeError, match="SCORERS"):
        str(Recipe(object()))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", RECIPES)
def test_compress_then_decompress_is_apply(text: str) -> None:
    source = prefilled(text)
    recipe = Recipe.parse(text)
    direct, crossed = recipe.apply(source), decompress(compress(source, text))
    assert crossed.recipe == direct.recipe == str(recipe)
    assert crossed.kept == direct.kept
    for ours, theirs in zip(direct, crossed, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.positions, theirs.positions)
        assert theirs.keys.dtype == torch.bfloat16
    assert (crossed.length, crossed.fingerprint, crossed.model_name) == (
        source.cache.length,
        source.cache.fingerprint,
        source.cache.model_name,
    )
    if recipe.fraction < 1:
        assert set(crossed.kept) == {kept_count(recipe.fraction, source.cache.length)}


def test_full_bf16_is_the_cache_itself() -> None:
    source = cache()
    crossed = decompress(compress(source, "full|bf16|zstd"))
    for before, after in zip(source, crossed, strict=True):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)


def test_none_drops_the_picture() -> None:
    crossed = decompress(compress(cache(), "none|int8"))
    visual = crossed.layout.visual
    assert not visual[crossed.layers[0].positions[0].numpy()].any()
    assert crossed.kept[0] == crossed.length - visual.sum()


def test_a_pruned_cache_can_be_encoded_again() -> None:
    pruned = decompress(compress(cache(), "knorm@0.5|bf16"))
    again = decompress(compress(pruned, "full|int8"))
    assert torch.equal(again.layers[1].positions, pruned.layers[1].positions)


def test_attention_is_needed_where_it_is_needed() -> None:
    with pytest.raises(EvidenceError, match="bare cache"):
        compress(cache(), "q2c@0.5|int8")
    with pytest.raises(EvidenceError, match="prefill"):
        compress(prefilled("full"), "q2c@0.5|int8")
    assert Recipe.parse("knorm@0.5").select(cache()).positions[0].shape == (2, 16)


def test_frames_come_one_by_one() -> None:
    frames = list(compress_frames(cache(layers=4), "full|int8"))
    assert len(frames) == 1 + 4 + 1
    assert b"".join(frames) == compress(cache(layers=4), "full|int8")


def test_nan_is_refused() -> None:
    broken = cache()
    broken.layers[2].keys[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="the keys of layer 2"):
        compress(broken, "full|int4")
