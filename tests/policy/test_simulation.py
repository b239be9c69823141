"""The simulator: against a question-by-question replay, with known answers, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from kvferry.errors import InputError
from kvferry.link import RateTrace, Trace, forecast, read_trace
from kvferry.link.channels import GilbertElliott, walk
from kvferry.policy import Context, OperatingPoint, PointTable, Way, decide, read_points
from kvferry.policy.simulation import Outcome, Scenario, simulate

TABLES = {table.name: table for table in read_points("scout-paper")}
QWEN = TABLES["qwen-7b"]


def constant(mbit: float) -> RateTrace:
    return RateTrace(np.array([1e6 * mbit]), 1.0)


def share(outcome: Outcome, name: str) -> float:
    return float(getattr(outcome, name).sum() / outcome.requests.sum())


def replay(scenario: Scenario, trace: Trace, way: Way, began: float) -> tuple[int, float, float]:
    """One session, one question at a time, with the scalar interface: (in time, quality, bytes)."""
    estimator, table, context = way.estimator(1), scenario.tables[0], scenario.context
    in_time, quality, sent, last = 0, 0.0, 0.0, None
    for step in range(scenario.episode):
        asked = began + scenario.every * step
        last = point = decide(way.policy, table.points, context, forecast(estimator), last).point
        start = asked + point.edge_seconds + point.compress_seconds
        arrived = float(trace.time_of(trace.offered(start) + point.nbytes)) if point.nbytes else start
        total = arrived - start + context.fixed_seconds(point)
        cut = asked + context.deadline
        by = start + context.deadline - context.fixed_seconds(point) + 1e-9
        carried = float(trace.offered(by) - trace.offered(start)) if by > start else 0.0
        worths = [worth for least, worth in point.anytime if carried >= least * point.nbytes]
        if total <= context.deadline + 1e-9:
            in_time += 1
            quality += point.quality
        elif worths:
            in_time += 1
            quality += worths[-1]
        if point.nbytes >= scenario.probe_bytes:
            got = min(point.nbytes, float(trace.offered(cut) - trace.offered(start)))
            ended = min(arrived, cut)
            estimator.observe(got, ended - start)
        else:
            got = min(scenario.probe_bytes, float(trace.offered(asked + scenario.every) - trace.offered(start)))
            ended = min(float(trace.time_of(trace.offered(start) + scenario.probe_bytes)), asked + scenario.every)
            estimator.observe(got, ended - start)
        sent += got
    return in_time, quality, sent


@pytest.mark.parametrize(
    "text", ["greedy", "greedy:1@harmonic", "risk-aware:0.3", "static:kv:full|int8", "static:kv:tiers"]
)
@pytest.mark.parametrize("trace", [read_trace("walk"), walk(2, 40).trace(60, 5), GilbertElliott(30.0).trace(60, 7)])
def test_lanes_in_step_are_sessions_one_by_one(text: str, trace: Trace) -> None:
    points = (
        OperatingPoint("kv:full|int8", 0.9, 4_000_000, 0.1, 0.05, 0.05, 0.2),
        OperatingPoint("kv:full|int4", 0.8, 2_000_000, 0.1, 0.05, 0.05, 0.2),
        OperatingPoint("kv:tiers", 0.85, 2_500_000, 0.1, 0.1, tiers=4, anytime=((0.3, 0.6), (0.5, 0.55), (0.7, 0.8))),
        OperatingPoint("scout", 0.5, 336, 0.1, cloud_seconds=0.4),
        OperatingPoint("local", 0.2, 0, 0.5),
    )
    scenario = Scenario(
        (PointTable("mine", points),), (trace,), Context(2.0, 0.05), every=3.0, requests=120, episode=40
    )
    outcome = simulate(scenario, Way.parse(text))
    began = np.random.default_rng(scenario.seed).random(scenario.lanes) * trace.period
    for lane, start in enumerate(began.tolist()):
        in_time, quality, sent = replay(scenario, trace, Way.parse(text), start)
        assert outcome.on_time[lane] == in_time
        assert outcome.quality[lane] == pytest.approx(quality)
        assert outcome.nbytes[lane] == pytest.approx(sent)


@pytest.mark.parametrize(("mbit", "mode"), [(100, "kv:full|bf16"), (50, "kv:full|int8"), (27, "kv:full|mixed")])
def test_a_constant_link_has_a_known_answer(mbit: float, mode: str) -> None:
    scenario = Scenario((QWEN,), (constant(mbit),), Context(1.0), requests=500)
    for text in ("greedy", "risk-aware", "oracle"):
        outcome = simulate(scenario, Way.parse(text))
        assert outcome.modes.most_common(1)[0][0] == mode
        assert share(outcome, "on_time") > 0.97


@pytest.mark.parametrize("agents", [1, 2])
def test_a_part_is_an_answer(agents: int) -> None:
    """A million bytes in a second are 8 Mbit/s for each agent; at 5 there are 62 % of them, at 1 there are 12."""
    tiers = PointTable("tiers", (OperatingPoint("kv", 0.9, 1_000_000, tiers=8, anytime=((0.3, 0.6), (0.6, 0.8))),))
    for mbit, worth in ((9, 0.9), (5, 0.8), (3, 0.6), (1, 0.0)):
        scenario = Scenario((tiers,), (constant(mbit * agents),), Context(1.0), agents=agents, requests=100 * agents)
        outcome = simulate(scenario, Way.parse("static:kv"), "equal")
        assert share(outcome, "quality") == pytest.approx(worth, abs=0.021), "the first round is blind"
        assert share(outcome, "on_time") == pytest.approx(1.0 if worth else 0.0, abs=0.021)
        if agents == 1:
            assert outcome.possible.sum() == outcome.on_time.sum()


def test_possible_is_what_some_point_could_have_done() -> None:
    small = OperatingPoint("kv:small", 0.5, 100_000)
    table = PointTable("two", (OperatingPoint("kv:large", 0.9, 1_000_000), small))
    outcome = simulate(Scenario((table,), (constant(2),), Context(1.0), requests=100), Way.parse("static:kv:large"))
    assert (share(outcome, "on_time"), share(outcome, "possible")) == (0, 1)
    outcome = simulate(Scenario((table,), (constant(0.5),), Context(1.0), requests=100), Way.parse("oracle"))
    assert (share(outcome, "on_time"), share(outcome, "possible")) == (0, 0)


def test_nobody_beats_the_oracle_and_it_never_misses_what_can_be_had() -> None:
    traces = tuple(walk(5, 60).trace(120, seed) for seed in range(3))
    scenario = Scenario((QWEN,), traces, Context(1.0, 0.02), requests=3_000)
    outcomes = {
        text: simulate(scenario, Way.parse(text))
        for text in ("oracle", "greedy", "risk-aware", *(f"static:{point.mode}" for point in QWEN.points))
    }
    oracle = outcomes.pop("oracle")
    for text, outcome in outcomes.items():
        assert share(outcome, "quality") < share(oracle, "quality"), text
        assert share(outcome, "on_time") <= share(oracle, "on_time") + 1e-9, text
    assert share(outcomes["greedy"], "on_time") > share(outcomes["static:kv:full|int8"], "on_time") + 0.1


def test_risk_aware_is_late_about_as_often_as_it_may() -> None:
    """A table with a fallback, a link whose errors repeat: late answers stay near the bound, greedy's do not."""
    points = PointTable("mine", (*QWEN.points, OperatingPoint("scout", 0.3, 336)))
    scenario = Scenario((points,), (walk(2, 60, stay=0.5).trace(2_000, 3),), Context(1.0), requests=20_000, episode=200)
    late = {text: 1 - share(simulate(scenario, Way.parse(text)), "on_time") for text in ("risk-aware:0.1", "greedy:1")}
    assert late["risk-aware:0.1"] < 0.12
    assert late["greedy:1"] > 0.15


def test_a_probe_lets_a_policy_come_back() -> None:
    points = PointTable("mine", (OperatingPoint("kv", 0.9, 2_000_000), OperatingPoint("scout", 0.3, 336)))
    trace = GilbertElliott(40.0, 0.1, good_seconds=30.0, bad_seconds=10.0).trace(600, 1)
    outcomes = [
        simulate(Scenario((points,), (trace,), Context(1.0), requests=2_000, probe_bytes=probe), Way.parse("greedy"))
        for probe in (65_536, 0)
    ]
    shares = [outcome.modes["kv"] / outcome.requests.sum() for outcome in outcomes]
    assert shares[0] > 0.6
    assert shares[1] == 0, "336 bytes say nothing about a link, so the first fallback is for good"
    assert share(outcomes[1], "nbytes") < 337


@pytest.mark.parametrize("every", [2.0, 0.5])
def test_poisson_arrivals_queue(every: float) -> None:
    """Half a link's load at 2 s, twice its capacity at 0.5 s; nothing is sent faster than the link carries."""
    points = PointTable("mine", (OperatingPoint("kv", 0.9, 1_000_000),))
    scenario = Scenario(
        (points,), (constant(16),), Context(1.5), agents=2, arrivals="poisson", every=every * 2, requests=8_000
    )
    outcome = simulate(scenario, Way.parse("static:kv"))
    seconds = outcome.requests.sum() * every
    assert outcome.nbytes.sum() * 8 / seconds <= 16e6 * 1.03
    assert (share(outcome, "on_time") > 0.9) == (every == 2.0)
    assert set(outcome.modes) == {"kv"}


@pytest.mark.parametrize(
    ("agents", "allocation", "rounds"), [(4, "equal", 0.0), (4, "model_aware", 1.0), (8, "model_aware", 0.0)]
)
def test_claim_15_on_the_derived_models(agents: int, allocation: str, rounds: float) -> None:
    """50 Mbit/s, 5 s, INT8 of Qwen 3B, 7B and 14B: parts by size save four agents, nothing saves eight."""
    tables = tuple(TABLES[name] for name in ("qwen-3b", "qwen-7b", "qwen-14b"))
    scenario = Scenario(tables, (constant(50),), Context(5.0), agents=agents, requests=400)
    outcome = simulate(scenario, Way.parse("static:kv:full|int8"), allocation)
    assert outcome.rounds_on_time.sum() / outcome.rounds.sum() == pytest.approx(rounds, abs=0.021), "the first is blind"


def test_a_fallback_saves_every_round() -> None:
    scenario = Scenario((TABLES["qwen-7b-scout"],), (constant(50),), Context(5.0), agents=8, requests=800)
    for allocation in ("equal", "model_aware", "max_min", "quality", "marginal"):
        outcome = simulate(scenario, Way.parse("greedy"), allocation)
        assert outcome.rounds_on_time.sum() == outcome.rounds.sum(), allocation


def test_the_same_seed_gives_the_same_outcome() -> None:
    make: Callable[[int], Scenario] = lambda seed: Scenario(  # noqa: E731
        (QWEN,), (read_trace("walk"),), Context(3.0), agents=3, arrivals="poisson", requests=600, seed=seed
    )
    one, two, other = (simulate(make(seed), Way.parse("greedy")) for seed in (1, 1, 2))
    assert np.array_equal(one.nbytes, two.nbytes)
    assert not np.array_equal(one.nbytes, other.nbytes)


def test_a_million_requests_take_less_than_a_minute_of_one_core(capsys: pytest.CaptureFixture[str]) -> None:
    scenario = Scenario((QWEN,), (read_trace("walk"),), Context(3.0), requests=100_000)
    began = time.process_time()
    requests = simulate(scenario, Way.parse("risk-aware")).requests.sum()
    per_minute = 60 * requests / (time.process_time() - began)
    with capsys.disabled():
        print(f"\n{per_minute / 1e6:.0f} million simulated requests per minute of one core (risk-aware)")
    assert per_minute >= 1e6


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scenario((), (constant(1),), Context(1.0)),
        lambda: Scenario((QWEN,), (), Context(1.0)),
        lambda: Scenario((QWEN,), (constant(1),), Context(1.0), agents=0),
        lambda: Scenario((QWEN,), (constant(1),), Context(1.0), arrivals="bursts"),
        lambda: Scenario((QWEN,), (constant(1),), Context(9.0), agents=2, every=5.0),
        lambda: simulate(Scenario((QWEN,), (constant(1),), Context(1.0), agents=2), Way.parse("static:image"), "equal"),
        lambda: simulate(Scenario((QWEN,), (constant(1),), Context(1.0)), Way.parse("static:image")),
        lambda: simulate(Scenario((QWEN,), (constant(1),), Context(1.0)), Way.parse("risk-aware@ewma")),
    ],
)
def test_what_cannot_be_simulated(make) -> None:
    with pytest.raises(InputError):
        make()
