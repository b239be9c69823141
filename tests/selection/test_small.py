"""Very small budgets: what yields to what, and that nobody is left to guess when a scorer had no say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest, Prefilled
from kvferry.recipe import Recipe, compress, decompress
from kvferry.selection import SCORERS, SINKS, Selection
from kvferry.summary import summarise_cache
from tests.helpers import cache as random_cache
from tests.helpers import layout

CHOOSERS = [name for name in SCORERS if name not in ("full", "none")]
N = 60
"""Tokens of the prompts here, in the cache: 3 text, 48 visual, 9 text."""
BEST = [20, 31, 10, 42, 15, 26, 37, 47, 12, 44]
"""By falling score."""


def prompt(rows: int = 6, columns: int = 8, **more: Any) -> KVCache:
    return random_cache(layout(rows=rows, columns=columns, question=7, **more))


def prefilled(recipe: str, source: KVCache, best: list[int]) -> Prefilled:
    """Every observation gives the tokens ``best`` the highest scores, falling; all others have next to none."""
    columns = torch.full((2, source.length), 1e-6)
    columns[:, best] = torch.linspace(1.0, 0.5, len(best))
    seen: dict[EvidenceRequest, dict[int, torch.Tensor]] = {}
    for request in Recipe.parse(recipe).requests:
        density = [torch.full((2,), 0.5 / (1 + 4 * i)) for i in range(len(source.layers))]
        sums = [columns] * len(source.layers)
        seen[request] = dict(enumerate(density if request.statistic == "density" else sums))
    return Prefilled(source, Evidence(seen), torch.empty(0))


def select(recipe: str, source: KVCache | None = None, best: list[int] = BEST) -> Selection:
    return Recipe.parse(recipe).select(prefilled(recipe, source or prompt(), best))


def at(keep: int, length: int = N) -> str:
    """The fraction that keeps ``keep`` tokens."""
    return f"@{keep / length:.4f}"


@pytest.mark.parametrize("name", ["snapkv", "h2o", "q2c", "vlcache"])
@pytest.mark.parametrize(
    ("keep", "recent"),
    [
        (4, {"snapkv": 0, "h2o": 0, "q2c": 0, "vlcache": 0}),
        (5, {"snapkv": 0, "h2o": 0, "q2c": 0, "vlcache": 0}),
        (6, {"snapkv": 0, "h2o": 0, "q2c": 0, "vlcache": 1}),
        (8, {"snapkv": 2, "h2o": 2, "q2c": 2, "vlcache": 1}),
        (12, {"snapkv": 5, "h2o": 5, "q2c": 2, "vlcache": 1}),
        (16, {"snapkv": 8, "h2o": 8, "q2c": 2, "vlcache": 2}),
    ],
)
def test_recent_tokens_yield_before_a_scorer_is_silenced(name: str, keep: int, recent: dict[str, int]) -> None:
    most = recent[name] if name != "vlcache" or keep != 6 else 0  # a quarter of 6 is 2: nothing is left for the end
    scorer = f"{name},kernel=1" if name == "snapkv" else name
    first, *options = scorer.split(",")
    selection = select(",".join([first + at(keep), *options]))
    chosen = sorted(BEST[: keep - 4 - most])
    for positions in selection.positions:
        for head in positions.tolist():
            assert head == [0, 1, 2, 3, *chosen, *range(N - most, N)]
    assert selection.scored == (len(chosen),) * 3


def test_at_eight_tokens_scorers_differ_from_streaming() -> None:
    """Issue 13: snapkv, h2o and streaming kept the same four sinks and four recent tokens."""
    recipes = {"streaming": "streaming" + at(8), "h2o": "h2o" + at(8), "snapkv": f"snapkv{at(8)},kernel=1"}
    kept = {name: select(recipe).positions[1][0].tolist() for name, recipe in recipes.items()}
    assert kept["streaming"] == [0, 1, 2, 3, 56, 57, 58, 59]
    assert kept["h2o"] == kept["snapkv"] == [0, 1, 2, 3, 20, 31, 58, 59]


@pytest.mark.parametrize("name", CHOOSERS)
@pytest.mark.parametrize("budget", ["uniform", "shared", "pyramid", "sparsity", "head"])
@pytest.mark.parametrize("modality", ["uniform", "adaptive:0.5", "visual_heavy:0.5"])
def test_from_six_tokens_a_scorer_chooses_a_quarter(name: str, budget: str, modality: str) -> None:
    if budget == "head" and name in ("q2c", "random", "streaming"):
        return  # one ranking for all heads has nothing to share out
    recipe = f"{name}{at(13)},budget={budget},modality={modality}"
    source = prompt()
    seen = prefilled(recipe, source, BEST)
    for request in Recipe.parse(recipe).requests:
        if request.statistic == "queries":
            seen.evidence.column_sums[request] = {i: torch.rand(4, 9, 8) for i in range(3)}
    selection = Recipe.parse(recipe).select(seen)
    for layer, scored in enumerate(selection.scored):
        keep = sum(x.shape[1] for x in selection.heads(layer)) // 2
        least = math.ceil(keep / 4) if keep >= 6 else max(keep - SINKS, 0)
        assert scored >= least


def test_a_budget_of_sinks_says_that_the_scorer_chose_nothing() -> None:
    for keep in (1, 2, 4):
        summary = select("h2o" + at(keep)).summary(prompt())
        assert summary.unscored_layers == 3
        assert "in 3 of 3 layers the scorer chose no token" in str(summary)
    for keep in (5, 30, N):
        summary = select("h2o" + at(keep)).summary(prompt())
        assert (summary.unscored_layers, summary.note) == (0, "")


def test_a_steep_pyramid_says_in_how_many_layers() -> None:
    source = random_cache(layout(rows=6, columns=8, question=7), layers=8)
    selection = select(f"knorm{at(10)},budget=pyramid:20", source)
    counts = [x.shape[1] for x in selection.positions]
    assert sum(counts) == 80
    few = sum(count <= SINKS for count in counts)
    assert few == 2
    assert selection.summary(source).note.startswith(f"in {few} of 8 layers")


def test_a_policy_that_fills_the_budget_is_noted() -> None:
    source = prompt()
    text = int((~source.layout.visual[:N]).sum())
    full = select(f"knorm{at(text + 1)},modality=text_preserving", source)  # one sink is a visual token
    assert full.scored == (0.0,) * 3
    assert "3 of 3" in full.summary(source).note
    roomy = select(f"knorm{at(text + 3)},modality=text_preserving", source)
    assert roomy.scored == (2.0,) * 3
    assert not roomy.summary(source).note


def test_skipping_the_picture_is_no_silenced_scorer() -> None:
    source = prompt()
    skipped = select(f"knorm{at(20)},modality=skip_visual:1", source)
    assert skipped.scored == ()
    assert not skipped.summary(source).note
    assert not select("none", source).summary(source).note
    assert not select("full", source).summary(source).note


def test_the_note_goes_with_the_kept_cache() -> None:
    seen = prefilled("h2o@0.05,merge=lookm", prompt(), BEST)
    kept = Recipe.parse("h2o@0.05,merge=lookm|int8").keep(seen)
    assert summarise_cache(kept).unscored_layers == 3
    assert not summarise_cache(decompress(compress(seen, "h2o@0.05|int8"))).note  # a stream does not say


@pytest.mark.parametrize("name", CHOOSERS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_very_short_prompts(name: str, length: int) -> None:
    source = random_cache(layout(text_before=length, rows=0, columns=0, question=1, tail=0))
    assert source.length == length
    for fraction in (0.01, 0.5, 1.0):
        recipe = f"{name}@{fraction}"
        seen = prefilled(recipe, source, [0])
        for request in Recipe.parse(recipe).requests:
            if request.statistic == "queries":
                seen.evidence.column_sums[request] = {i: torch.rand(4, 9, 8) for i in range(3)}
        positions = Recipe.parse(recipe).select(seen).positions[0]
        keep = max(1, math.floor(fraction * length + 0.5))
        assert positions.shape == (2, keep)
        assert positions[0, : min(keep, SINKS)].tolist() == list(range(min(keep, SINKS)))


def test_a_shared_ranking_keeps_the_end_in_order() -> None:
    """The tail of q2c used to be raised in the scores: summed over layers, it overflowed into ties."""
    source = random_cache(layout(rows=6, columns=8, question=9, tail=7))
    assert source.length == 66
    selection = select(f"q2c{at(10, 66)},budget=shared", source, best=[20, 31, 10])
    (head, *_) = selection.positions[0].tolist()
    assert head == [0, 1, 2, 3, 10, 20, 31, 63, 64, 65]


def test_a_question_before_the_picture_still_chooses() -> None:
    """Everything behind the question is unseen by it: it stays as far as a quarter is left for what was seen."""
    source = prompt()
    role = source.layout.role.copy()
    role[:] = 0
    role[2] = 1
    object.__setattr__(source.layout, "role", role)
    scorer = SCORERS["q2c"]()
    assert scorer.unseen(source) == N - 3
    positions = select("q2c" + at(16), source, best=[10, 20, 30, 40]).positions[0][0].tolist()
    assert positions == [0, 1, 2, 3, 10, 20, 30, 40, *range(52, 60)]


@dataclass(frozen=True)
class Greedy:
    """A scorer from outside that asks for more recent tokens than there are."""

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        return ()

    def score(self, cache: KVCache, evidence: Evidence) -> list[torch.Tensor]:
        ranking = torch.zeros(1, cache.length)
        ranking[:, BEST] = 1.0
        return [ranking] * len(cache.layers)

    def recent(self, keep: int) -> int:
        return 10 * keep


def test_a_scorer_cannot_silence_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "greedy", Greedy)
    selection = select("greedy" + at(20))
    assert selection.scored == (5.0,) * 3
    kept = selection.positions[0][0].tolist()
    assert kept[-11:] == list(range(49, 60))
