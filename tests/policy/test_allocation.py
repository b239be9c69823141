"""Sharing an uplink: the guarantee, optimality against two independent solvers, and fairness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from kvferry.errors import InputError
from kvferry.link import Rate
from kvferry.policy import Context, OperatingPoint
from kvferry.policy.allocation import ALLOCATORS, Agent, Options, allocate
from kvferry.policy.allocation.max_min import water_filled

FALLBACK = st.builds(OperatingPoint, st.sampled_from(["scout", "prompt"]), st.floats(0, 0.5), st.integers(0, 2000))
CACHES = st.lists(
    st.builds(OperatingPoint, st.just("kv"), st.floats(0.3, 1).map(lambda q: round(q, 3)), st.integers(1, 10**7)),
    max_size=4,
).map(
    lambda points: [OperatingPoint(f"kv:{i}", x.quality, x.nbytes, edge_seconds=0.1 * i) for i, x in enumerate(points)]
)


def agents(fallbacks: bool) -> st.SearchStrategy[list[Agent]]:
    points = st.tuples(FALLBACK, CACHES).map(lambda x: (x[0], *x[1]))
    if not fallbacks:
        points = CACHES.filter(bool).map(tuple)
    one = st.builds(Agent, st.just("a"), points, st.floats(0.5, 5).map(Context))
    return st.lists(one, min_size=1, max_size=5)


def seconds(agent: Agent, point: OperatingPoint, rate: float) -> float:
    return agent.context.fixed_seconds(point) + (8 * point.nbytes / rate if point.nbytes else 0.0)


@pytest.mark.parametrize("method", ALLOCATORS)
@given(crowd=agents(fallbacks=True), spare=st.floats(1, 1e4))
@settings(max_examples=60)
def test_with_fallbacks_that_fit_everybody_is_in_time(method: str, crowd: list[Agent], spare: float) -> None:
    rate = Rate(max(1.0, float(Options.of(crowd).reserve.sum())) * spare)
    grants = allocate(ALLOCATORS[method], crowd, rate)
    assert sum(grant.bits_per_second for grant in grants) <= rate.bits_per_second * (1 + 1e-9)
    for grant in grants:
        assert grant.point is not None
        taken = seconds(grant.agent, grant.point, grant.bits_per_second)
        assert taken <= grant.agent.context.deadline * (1 + 1e-9)


@pytest.mark.parametrize("method", ALLOCATORS)
@given(crowd=st.one_of(agents(fallbacks=True), agents(fallbacks=False)), mbit=st.floats(1e-4, 100))
@settings(max_examples=60)
def test_whoever_is_served_is_in_time(method: str, crowd: list[Agent], mbit: float) -> None:
    grants = allocate(ALLOCATORS[method], crowd, Rate(1e6 * mbit))
    assert sum(grant.bits_per_second for grant in grants) <= 1e6 * mbit * (1 + 1e-9)
    for grant in grants:
        if grant.point is not None:
            taken = seconds(grant.agent, grant.point, grant.bits_per_second)
            assert taken <= grant.agent.context.deadline * (1 + 1e-9)


def value(crowd: list[Agent], points: list[OperatingPoint | None]) -> tuple[int, float]:
    """What is to be the largest: how many are served, then their quality."""
    served = [x for x in points if x is not None]
    return len(served), sum(x.quality for x in served)


@given(crowd=st.one_of(agents(fallbacks=True), agents(fallbacks=False)), mbit=st.floats(0.001, 100))
@settings(max_examples=60)
def test_no_combination_beats_quality(crowd: list[Agent], mbit: float) -> None:
    options, rate = Options.of(crowd), 1e6 * mbit
    best = (0, 0.0)
    for combination in itertools.product(*([None, *range(len(agent.points))] for agent in crowd)):
        needed = sum(options.needed[i, j] for i, j in enumerate(combination) if j is not None)
        if needed <= rate:
            points = [None if j is None else crowd[i].points[j] for i, j in enumerate(combination)]
            best = max(best, value(crowd, points))
    found = value(crowd, [grant.point for grant in allocate(ALLOCATORS["quality"], crowd, Rate(rate))])
    assert found[0] == best[0]
    assert found[1] == pytest.approx(best[1], abs=1.1e-4 * len(crowd))


def drawn(rng: np.random.Generator, count: int) -> list[Agent]:
    """Agents with concave-ish random tables, as caches at different bits have."""
    result = []
    for _ in range(count):
        size = 10 ** rng.uniform(6, 7.5)
        caches = [
            OperatingPoint(f"kv:{i}", round(float(rng.uniform(0.5, 1.0)), 4), int(size / 2**i * rng.uniform(0.8, 1.2)))
            for i in range(5)
        ]
        result.append(Agent("a", (*caches, OperatingPoint("scout", 0.4, 336)), Context(float(rng.uniform(1, 5)))))
    return result


def solved_by_highs(options: Options, budget: float) -> float:
    """Largest total quality with everybody served, by integer programming."""
    agents_, points = options.needed.shape
    usable = np.isfinite(options.needed).ravel()
    once = np.kron(np.eye(agents_), np.ones(points))
    needed = np.where(usable, options.needed.ravel(), 0.0) / budget
    done = milp(
        -options.quality.ravel(),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(needed[None], -np.inf, 1)],
        integrality=np.ones(usable.size),
        bounds=Bounds(0, usable.astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    return float(-done.fun)


def test_quality_is_what_highs_finds_and_marginal_is_close() -> None:
    rng, gaps = np.random.default_rng(0), []
    for _ in range(25):
        crowd = drawn(rng, 12)
        options = Options.of(crowd)
        budget = float(options.needed[:, 2].sum() * rng.uniform(0.3, 1.5))
        exact, greedy = (
            sum(grant.point.quality for grant in allocate(ALLOCATORS[name], crowd, Rate(budget)))
            for name in ("quality", "marginal")
        )
        assert exact == pytest.approx(solved_by_highs(options, budget), abs=1.3e-3)
        gaps.append(1 - greedy / exact)
    assert min(gaps) >= -1e-4
    assert np.mean(gaps) < 0.01
    assert max(gaps) < 0.03


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0, 300))
def test_water_filling_is_max_min_fair(demand: list[float], supply: float) -> None:
    parts = water_filled(np.array([demand]), np.array([supply]))[0]
    assert (parts <= np.array(demand) + 1e-9).all()
    assert parts.sum() == pytest.approx(min(supply, sum(demand)))
    unmet = parts < np.array(demand) - 1e-6
    if unmet.any():  # whoever is short has as much as anybody
        assert parts[unmet].min() >= parts.max() - 1e-6


def test_equal_parts_fail_where_parts_by_size_do() -> None:
    """The sources' claim 15 in small: three models of different size, one deadline, 8-bit caches only."""
    sizes = (3_000_000, 4_700_000, 16_100_000, 3_000_000)
    crowd = [Agent(str(size), (OperatingPoint("kv:int8", 0.99, size),), Context(5.0)) for size in sizes]
    rate = Rate.parse("50mbit")
    assert sum(grant.point is None for grant in allocate(ALLOCATORS["equal"], crowd, rate)) == 1
    for method in ("model_aware", "quality", "marginal"):
        assert all(grant.point is not None for grant in allocate(ALLOCATORS[method], crowd, rate)), method


def test_who_does_not_fit_is_refused_at_once() -> None:
    crowd = [Agent("a", (OperatingPoint("scout", 0.5, 100_000),), Context(1.0)) for _ in range(3)]
    for method in ALLOCATORS:
        grants = allocate(ALLOCATORS[method], crowd, Rate(2e6))
        refused = [grant for grant in grants if grant.point is None]
        assert [grant.bits_per_second for grant in refused] == [0], method


def test_nobody_to_share_with() -> None:
    with pytest.raises(InputError, match="agent"):
        allocate(ALLOCATORS["equal"], [], Rate(1.0))
