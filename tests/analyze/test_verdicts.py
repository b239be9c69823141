"""Every answer turns with the data."""

from __future__ import annotations

import numpy as np
import pytest

from kvferry.analyze.harm import HarmResult
from kvferry.analyze.mass import MassResult
from kvferry.analyze.observe import ALONE, DROPS, NEEDED, UNSAID
from kvferry.analyze.overlap import OverlapResult
from kvferry.analyze.rank import RankResult
from kvferry.analyze.separability import ApartResult
from kvferry.analyze.sparsity import SparsityResult
from kvferry.analyze.survivors import SurvivorsResult
from kvferry.analyze.tail import TailResult
from kvferry.analyze.verdicts import (
    agreement,
    answers,
    can_skip,
    interval_text,
    lower_rank,
    more_aggressive,
    paragraph,
    tells_apart,
)
from kvferry.statistics import Estimate

N = 80
NONE = np.zeros((0,))
SPARSITY = SparsityResult(NONE, NONE, np.tile([0.6, 0.4], (N, 1)))
TAIL = TailResult(NONE, NONE, NONE, np.full(N, 0.3))
MASS = MassResult(NONE, NONE, NONE, NONE, NONE, np.array([[ALONE, 0.1], [NEEDED, 0.5]]))
SURVIVORS = SurvivorsResult(("q2c",), np.full((1, 3, 2), 0.5), ())


def noisy(mean: float, n: int = N) -> np.ndarray:
    return mean + 0.1 * np.random.default_rng(0).standard_normal(n)


def rank(ratio: float, n: int = N) -> RankResult:
    text = np.full((n, 3), 8.0)
    return RankResult(NONE, NONE, NONE, np.stack([text * noisy(ratio, n)[:, None], text], -1), 10, 10)


def harm(visual: float, text: float) -> HarmResult:
    lost = {("visual", 0.25): noisy(visual), ("text", 0.25): noisy(text)[::-1]}
    columns = [lost.get(drop, np.zeros(N)) for drop in DROPS]
    return HarmResult(NONE, NONE, NONE, np.stack([np.full(N, UNSAID), *columns, *columns], -1))


def skipping(share: float, n: int, needs: int = ALONE) -> HarmResult:
    same = np.arange(n) < round(share * n)
    rest = np.zeros((n, 2 * len(DROPS) - 1))
    return HarmResult(NONE, NONE, NONE, np.column_stack([np.full(n, needs), rest, same]))


@pytest.mark.parametrize(("ratio", "verdict"), [(0.5, "yes"), (1.0, "undecided"), (1.5, "no")])
def test_lower_rank(ratio: float, verdict: str) -> None:
    answer = lower_rank(rank(ratio))
    assert answer.verdict == verdict
    assert answer.estimate is not None
    assert answer.estimate.low < ratio < answer.estimate.high
    assert f"{answer.estimate.mean:.2f} [" in answer.words
    assert ("inside" in answer.words) == (ratio == 0.5)


def test_too_few_prompts_decide_nothing() -> None:
    assert lower_rank(rank(0.5, n=19)).verdict == "undecided"
    assert tells_apart(ApartResult(np.full(19, 0.9)), SURVIVORS).verdict == "undecided"
    assert can_skip(skipping(0.0, 19), MASS).verdict == "undecided"


@pytest.mark.parametrize(("visual", "text", "verdict"), [(1, 2, "yes"), (2, 2, "undecided"), (2, 1, "no")])
def test_more_aggressive(visual: float, text: float, verdict: str) -> None:
    assert more_aggressive(harm(visual, text), SPARSITY, TAIL).verdict == verdict


@pytest.mark.parametrize(
    ("chance", "verdict"), [(0.9, "yes"), (0.1, "yes"), (0.5, "no"), (0.6, "undecided"), (0.4, "undecided")]
)
def test_tells_apart(chance: float, verdict: str) -> None:
    answer = tells_apart(ApartResult(noisy(chance)), SURVIVORS)
    assert answer.verdict == verdict
    assert "keeps 50%" in answer.words


@pytest.mark.parametrize(
    ("share", "n", "verdict"), [(1.0, 60, "yes"), (1.0, 59, "undecided"), (0.95, 80, "undecided"), (0.6, 30, "no")]
)
def test_can_skip(share: float, n: int, verdict: str) -> None:
    assert can_skip(skipping(share, n), MASS).verdict == verdict


def test_without_marked_questions_nobody_can_say() -> None:
    answer = can_skip(skipping(1.0, 90, UNSAID), MASS)
    assert answer.verdict == "undecided"
    assert answer.estimate is None
    assert "needs_image" in answer.words


def test_without_pictures_there_is_nothing_to_ask() -> None:
    found = answers(0, rank(1), SPARSITY, MASS, TAIL, ApartResult(NONE), harm(1, 1), None, SURVIVORS)  # type: ignore[arg-type]
    assert [x.verdict for x in found] == ["not applicable"] * 4
    assert "no picture" in paragraph(found)


def test_agreement_names_every_scorer() -> None:
    samples = np.broadcast_to(np.array([[0.8], [0.6], [0.4]]), (30, 2, 3, 1))
    ((name, shares),) = agreement(OverlapResult(("q2c",), NONE, NONE, NONE, samples))
    assert name == "q2c"
    assert [interval_text(x) for x in shares] == ["0.80 [0.80, 0.80]", "0.60 [0.60, 0.60]", "0.40 [0.40, 0.40]"]


def test_a_small_end_of_an_interval_does_not_read_as_nothing() -> None:
    assert interval_text(Estimate(0.163, 0.0032, 0.43, 24)) == "0.16 [0.0032, 0.43]"
    assert interval_text(Estimate(1.0, 0.0, -0.5, 24)) == "1.00 [0.00, -0.50]"
