"""Which recipes stay in the search, and which one wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.errors import InputError
from kvferry.evaluate.records import Line
from kvferry.fit import tune
from kvferry.fit.tune import Tuning, candidates, presets, standings, still_in
from kvferry.recipe import Recipe


def lines(n: int, **right: int) -> list[Line]:
    """``n`` questions; each recipe is right on so many of them, the full cache on all."""
    sizes = {"good": 500, "small": 100, "large": 900}
    return [
        Line(i, "count", "A", 10_000, 1_000, 50, {"full|bf16": (1, 10_000)} | {
            name: (int(i < count), sizes[name]) for name, count in right.items()
        })
        for i in range(n)
    ]  # fmt: skip


def test_the_smallest_that_passes_wins() -> None:
    found = standings(lines(200, good=199, small=150, large=200), 0.98)
    assert [x.recipe for x in found] == ["small", "good", "large"]
    assert [x.passes for x in found] == [False, True, True]
    assert [x.recipe for x in still_in(found)] == ["good", "large"]
    more = standings(lines(2000, good=1990, small=1500, large=2000), 0.98)
    assert [x.recipe for x in still_in(more)] == ["good"]
    assert found[1].share == pytest.approx(199 / 200)
    assert found[1].margin == pytest.approx(199 / 200 - 0.98)


def test_what_is_not_sure_yet_stays_in() -> None:
    few = standings(lines(40, good=40, small=38, large=40), 0.98)
    assert [x.recipe for x in still_in(few)] == ["small", "good", "large"]
    many = standings(lines(300, good=300, small=290, large=300), 0.98)
    assert [x.recipe for x in still_in(many)] == ["small", "good"]


def test_recipes_that_only_reach_the_target_do_not_crowd_out_those_that_pass() -> None:
    crowd = {f"doubtful{i}": 100 + i for i in range(9)}
    made = [
        Line(j, "count", "A", 10_000, 1_000, 50, {"full|bf16": (1, 10_000), "large": (1, 900)} | {
            name: (int(j < 1991), size) for name, size in crowd.items()
        })
        for j in range(2000)
    ]  # fmt: skip
    found = standings(made, 0.995)
    assert sum(x.margin >= 0 and not x.passes for x in found) == 9
    assert "large" in [x.recipe for x in still_in(found)]


def test_presets_are_the_smallest_at_their_goals() -> None:
    assert presets(lines(2000, good=1985, small=1500, large=2000), 0.98) == {
        "tiny": "good", "balanced": "large", "lossless": "full|bf16|zstd",
    }  # fmt: skip
    assert presets(lines(50, good=10), 0.98) == {"lossless": "full|bf16|zstd"}


def test_an_oracle_does_not_stand() -> None:
    made = lines(10, good=10)
    for line in made:
        line.outcomes["good oracle"] = (1, 1)
    assert [x.recipe for x in standings(made, 0.9)] == ["good"]


def test_a_model_that_knows_nothing_is_no_measure() -> None:
    with pytest.raises(InputError, match="nothing right"):
        standings([Line(0, "count", "A", 1, 1, 1, {"full|bf16": (0, 1), "good": (0, 1)})], 0.98)


def test_rounds_drop_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, tuple[str, ...]]] = []

    def run(plan: tune.Sweep, out: Path, processes: int) -> list[Line]:
        asked.append((plan.n, plan.recipes))
        return []

    monkeypatch.setattr(tune, "run", run)
    monkeypatch.setattr(tune, "read", lambda out: ({}, [
        Line(i, "count", "A", 9, 9, 9, {"full|bf16": (1, 900), "knorm@0.5|int4": (1, 90), "knorm@0.1|int4": (i % 2, 9)})
        for i in range(50)
    ]))  # fmt: skip
    search = Tuning("m", ("knorm@0.5|int4", "knorm@0.1|int4"), tmp_path, rounds=(50, 100)).search(1)
    assert len(list(search)) == 1
    assert asked == [(50, ("full|bf16", "knorm@0.5|int4", "knorm@0.1|int4"))]


def test_candidates_are_recipes() -> None:
    without, with_profile = candidates(False), candidates(True)
    assert set(without) < set(with_profile)
    assert all("transform" not in x for x in without)
    for text in with_profile:
        assert str(Recipe.parse(text)) == text


def test_never_on_the_test_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use validation"):
        Tuning("m", (), tmp_path, split="test")
    with pytest.raises(InputError, match="share"):
        Tuning("m", (), tmp_path, target=1.5)
