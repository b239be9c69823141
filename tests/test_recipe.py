"""Recipes as text, and what they do to a cache."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvferry.codecs import CODECS, Integer
from kvferry.codecs.grammar import without_files
from kvferry.errors import BudgetError, EvidenceError, InputError, RecipeError
from kvferry.evidence import Evidence, Prefilled
from kvferry.recipe import Recipe, compress, compress_frames, decompress
from kvferry.selection import Q2C, SCORERS, KNorm, Random, SnapKV, kept_count
from kvferry.selection.budgets import Head, Pyramid, Sparsity, Uniform
from kvferry.selection.merge import LookM
from kvferry.selection.modality import Adaptive, SkipVisual, TextPreserving, VisualHeavy
from kvferry.selection.modality import Uniform as Alike
from tests.helpers import cache

RECIPES = [
    "full", "none|int4", "q2c@0.5|int8", "snapkv@0.25|int3|zstd", "knorm@0.3|bf16", "random@0.1,seed=7|int2",
    "snapkv@0.3,window=4,budget=head,merge=lookm|int8", "knorm@0.5,budget=pyramid:2,modality=text_preserving|int4|zstd",
]  # fmt: skip


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


shares = st.floats(0, 1)
budgets = st.one_of(
    st.builds(Uniform), st.builds(Sparsity), st.builds(Head, shares), st.builds(Pyramid, st.floats(1, 1e6))
)
names = st.text("abcXYZ019._-/ =:@", min_size=1).filter(lambda x: x == x.strip())
policies = st.one_of(
    st.builds(Alike),
    st.builds(TextPreserving),
    st.builds(VisualHeavy, shares),
    st.builds(Adaptive, st.floats(0, 0.5)),
    st.builds(SkipVisual, shares),
    st.builds(SkipVisual, profile=names),
)
merges = st.one_of(st.none(), st.builds(LookM, st.sampled_from(["averaged", "pivotal", "weighted"])))


@settings(deadline=None)
@given(
    st.one_of(
        st.builds(Recipe, scorers, fractions, codecs, stages, budgets, policies, merges),
        st.builds(Recipe, scorers, st.just(1.0), codecs, stages, budgets, policies, merges, st.integers(1, 10**12)),
    )
)
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
        ("snapkv@0.1,budget=head,window=8,modality=uniform", "snapkv@0.1,window=8,budget=head|bf16"),
        ("q2c@0.1, merge = lookm : pivotal ,budget=pyramid:20.0", "q2c@0.1,budget=pyramid,merge=lookm:pivotal|bf16"),
        ("q2c, bytes=2000,modality=visual_heavy:.5|int4", "q2c,modality=visual_heavy:0.5,bytes=2000|int4"),
        ("knorm@0.1,modality=skip_visual@a/b=1.json", "knorm@0.1,modality=skip_visual@a/b=1.json|bf16"),
        ("none,merge=lookm|int4", "none,merge=lookm|int4"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert str(Recipe.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("full|transform:8@/home/ann/a.profile|zstd", "full|transform:8|zstd"),
        ("full|mixed@here.json", "full|mixed"),
        ("vlcache@0.25,budget=measured@/home/ann/b.json|int4", "vlcache@0.25,budget=measured|int4"),
        ("snapkv@0.5,window=8,budget=shared|kvtc:16@c,keep=1", "snapkv@0.5,window=8,budget=shared|kvtc:16,keep=1"),
        ("q2c@0.5|int8", "q2c@0.5|int8"),
        ("", ""),
    ],
)
def test_names_of_files_stay_here(text: str, sent: str) -> None:
    assert without_files(text) == sent


def test_a_stream_does_not_tell_where_its_model_lies() -> None:
    for name, told in (("/home/ann/models/mine", "mine"), ("testbed/cloud", "testbed/cloud"), ("", "")):
        assert decompress(compress(replace(cache(), model_name=name), "full|int8")).model_name == told


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
        ("knorm@0.5,window=3", "no option 'window'; choose from budget, bytes, merge, modality"),
        ("q2c@0.5,budgt=head", "did you mean 'budget'"),
        ("q2c@0.5,budget=pyramyd", "did you mean 'pyramid'"),
        ("q2c@0.5,modality=text_preserve", "did you mean 'text_preserving'"),
        ("q2c@0.5,merge=look-m", "did you mean 'lookm'"),
        ("q2c@0.5,merge=lookm:mean", "choose from averaged, pivotal, weighted"),
        ("q2c@0.5,budget=head:much", "type float"),
        ("q2c@0.5,budget=uniform:3", "takes no :3"),
        ("q2c@0.5,budget=head@p.json", "takes no @p.json"),
        ("q2c@0.5,budget=head,budget=head", "twice"),
        ("q2c@0.5,budget", "key=value"),
        ("q2c@0.5,bytes=1000", "not both"),
        ("q2c,bytes=many", "whole number"),
        ("q2c,bytes=0", "positive"),
        ("full,budget=head", "takes no budget"),
        ("none,bytes=100", "takes no budget and no bytes"),
        ("none,modality=adaptive", "no modality policy"),
        ("full,merge=lookm", "evicts nothing"),
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
    if recipe.fraction < 1 and "pyramid" not in text:
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


@pytest.mark.parametrize("text", ["knorm,bytes={}|int4", "q2c,bytes={}|int8|zstd", "knorm,budget=head,bytes={}|int4"])
@pytest.mark.parametrize("size", [900, 1100, 1500])
def test_bytes_are_filled_and_not_exceeded(text: str, size: int) -> None:
    text = text.format(size)
    source = prefilled(text)
    blob = compress(source, text)
    keep = decompress(blob).kept[0]
    assert decompress(blob).recipe == str(Recipe.parse(text))
    assert len(blob) <= size
    assert Recipe.parse(text).select(source).positions[0].numel() == 2 * keep
    one_more = replace(Recipe.parse(text), bytes=None, fraction=min(1.0, (keep + 1) / source.cache.length))
    wider = len(compress(source, one_more)) + len(str(Recipe.parse(text))) - len(str(one_more))
    assert keep == source.cache.length or wider > size - 12  # zstd may pack the header a little differently


def test_bytes_that_hold_nothing_or_everything() -> None:
    with pytest.raises(BudgetError, match=r"smallest bitstream of knorm,bytes=100\|int4 takes [0-9]+ bytes") as error:
        compress(cache(), "knorm,bytes=100|int4")
    smallest = int(str(error.value).split(" takes ")[1].split()[0])
    assert len(compress(cache(), f"knorm,bytes={smallest}|int4")) == smallest
    assert decompress(compress(cache(), "knorm,bytes=1000000|int4")).kept == (31, 31, 31)
    text = int((~cache().layout.visual[:31]).sum())
    with pytest.raises(BudgetError, match=f"{text + 1} tokens per layer"):
        compress(cache(), "knorm,modality=text_preserving,bytes=100|int4")


def test_the_example_of_contributing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    document = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    module = ModuleType("lastrow")
    monkeypatch.setitem(sys.modules, "lastrow", module)
    exec(document.split("```python\n")[1].split("```")[0], module.__dict__)
    monkeypatch.setitem(SCORERS, "lastrow", module.LastRow)
    text = "lastrow@0.25,budget=head,modality=adaptive|int4"
    crossed = decompress(compress(prefilled(text), text))
    assert crossed.kept == (8, 8, 8)
    assert crossed.recipe == text
