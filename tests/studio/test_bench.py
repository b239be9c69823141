"""What the page shows is what was kept, what it costs and what is answered, all by the library's own doors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import kvferry
from kvferry import VLM, Recipe
from kvferry.errors import BudgetError, EvidenceError, InputError, RecipeError
from kvferry.pictures import jpeg_of
from kvferry.studio.bench import Bench, kept_shares, layer_bytes, parts_of
from kvferry.studio.examples import examples

RECIPE = "leaveout@0.1,budget=head|int4|zstd"


def test_kept_shares_are_those_of_the_bitstream(bench: Bench, model: VLM) -> None:
    view = bench.view(RECIPE)
    prefilled = model.prefill(bench.pictures, bench.question, recipe=RECIPE)
    blob = kvferry.compress(prefilled, RECIPE)
    cache = kvferry.decompress(blob)
    assert view.this.bytes == view.report.total_bytes == len(blob)
    assert view.this.text == model.answer(cache)
    for row, layer in zip(view.kept, cache, strict=True):
        heads = [set(head.positions[0].tolist()) for head in layer.split()]
        expected = [sum(token in head for head in heads) / len(heads) for token in range(cache.length)]
        np.testing.assert_allclose(row, expected, atol=1e-6)
    assert view.kept.mean() * cache.length == pytest.approx(np.mean(view.report.kept.layers), rel=1e-5)


def test_all_and_nothing_of_a_picture(bench: Bench) -> None:
    full, floor = bench.view("full|bf16"), bench.view("none|bf16")
    visual = full.layout.visual[: full.kept.shape[1]]
    assert (full.kept == 1).all()
    assert full.this.text == full.full.text == examples()[0].truth
    assert full.this.agree == 1
    assert full.this.kl < 1e-3
    assert not floor.kept[:, visual].any()
    assert (floor.kept[:, ~visual] == 1).all()
    assert floor.this == floor.floor == full.floor
    assert floor.this.kl > full.this.kl
    assert full.jpeg_bytes == len(jpeg_of(bench.pictures[0]))


def test_a_grid_lies_over_its_own_picture(model: VLM) -> None:
    pair = examples()[-1]
    assert len(pair.pictures) == 2
    view = Bench(model, pair.pictures, pair.question).view("leaveout@0.2|bf16")
    length = view.kept.shape[1]
    at = np.flatnonzero(view.layout.visual[:length])
    for number, (_, rows, columns) in enumerate(view.layout.grids):
        grid = view.grid(number, 3)
        assert grid is not None
        assert grid.shape == (rows, columns)
        first, at = at[: rows * columns], at[rows * columns :]
        np.testing.assert_array_equal(grid.ravel(), view.kept[3, first])
    assert view.grid(2) is None
    assert view.visual_by_layer[3] == pytest.approx(view.kept[3, view.layout.visual[:length]].mean())


def test_words_are_the_prompt(bench: Bench, model: VLM) -> None:
    view = bench.view(RECIPE)
    asked = "".join(word.text for word in view.words if word.kind == "question")
    assert asked.strip() == model.tokenizer.decode(view.layout.token_ids[view.layout.question].tolist())
    assert asked.split()[:-1] == bench.question.removesuffix("?").split()
    assert sum(word.tokens for word in view.words) == len(view.layout)
    (picture,) = [word for word in view.words if word.kind == "visual"]
    assert picture.tokens == int(view.layout.visual.sum())
    assert [word.share is None for word in view.words] == [False] * (len(view.words) - 1) + [True]


@pytest.mark.parametrize("recipe", ["leaveout@0.1|int4|zstd", "knorm@0.3,budget=pyramid|kivi:2", "full|fp8"])
def test_parts_are_all_bytes(bench: Bench, recipe: str) -> None:
    view = bench.view(recipe)
    assert sum(part.bytes for part in parts_of(view.report)) == view.this.bytes
    outside = view.report.header_bytes + view.report.trailer_bytes
    assert sum(layer_bytes(view.report)) + outside == view.this.bytes


def test_a_frame_of_all_layers_has_no_bytes_by_layer(bench: Bench) -> None:
    report = bench.view("knorm@0.3,budget=shared|int4").report
    assert len(layer_bytes(report)) == report.layers
    joint = replace(report, frames=(replace(report.frames[0], layers=report.layers),))
    assert layer_bytes(joint) == ()


def test_a_new_budget_reads_nothing_again(model: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    prefill = model.prefill

    def counted(*given: Any, **more: Any) -> Any:
        read.append(more["requests"])
        return prefill(*given, **more)

    monkeypatch.setattr(model, "prefill", counted)
    bench = Bench(model, examples()[1].pictures, examples()[1].question)
    for recipe in ("snapkv@0.1|int4", "snapkv@0.4|int8", "knorm@0.2|int4"):
        bench.view(recipe)
    assert len(read) == 1
    bench.view("h2o@0.1|int4")
    bench.view("snapkv@0.1|int4")
    assert len(read) == 2
    assert set(read[0]) < set(read[1])


def test_shipped_first_the_question_comes_on_top(model: VLM) -> None:
    scene = examples()[0]
    bench = Bench(model, scene.pictures, scene.question, ship_first=True)
    view = bench.view("knorm@0.5|int8")
    prefilled = model.prefill(scene.pictures, recipe="knorm@0.5|int8")
    cache = kvferry.decompress(kvferry.compress(prefilled, "knorm@0.5|int8"))
    assert view.this.text == model.answer(cache, scene.question)
    assert not any(word.kind == "question" for word in view.words)
    with pytest.raises(EvidenceError, match=r"q2c@0\.2\|int4 looks at the question.*ask first"):
        bench.view("q2c@0.2|int4")
    assert bench.view("knorm@0.5|int8").this == view.this


def test_mistakes_are_named(bench: Bench, model: VLM) -> None:
    with pytest.raises(RecipeError, match="did you mean 'leaveout'"):
        bench.view("leaveot@0.1|int4")
    with pytest.raises(BudgetError):
        bench.view("leaveout,bytes=20|int4")
    with pytest.raises(InputError, match="no question yet"):
        Bench(model, bench.pictures, "  ")
    with pytest.raises(InputError, match="needs a picture"):
        Bench(model, (), "what?", ship_first=True)


def test_a_text_needs_no_picture(model: VLM) -> None:
    view = Bench(model, (), "note: kim has 1. what has kim?").view("knorm@0.5|int8")
    assert view.grid(0) is None
    assert not view.visual_by_layer.any()
    assert view.jpeg_bytes == 0


def test_shares_count_heads_of_unequal_length(bench: Bench) -> None:
    cache = Recipe.parse(RECIPE).keep(bench.vlm.prefill(bench.pictures, bench.question, recipe=RECIPE))
    assert any(layer.counts for layer in cache)
    assert kept_shares(cache).sum(1) == pytest.approx([sum(x.per_head) / x.heads for x in cache], rel=1e-5)
