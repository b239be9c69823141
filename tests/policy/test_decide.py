"""Single decisions: constraints, what is not known, hysteresis, reasons, and break-even rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import DeadlineError, InputError
from kvferry.link import Forecast
from kvferry.policy import (
    Context,
    Greedy,
    OperatingPoint,
    Oracle,
    RiskAware,
    Static,
    Way,
    crossover,
    decide,
    explain,
)

IMAGE = OperatingPoint("image", 0.95, 250_000, cloud_seconds=0.6, needs=("pixels",))
EMBEDS = OperatingPoint("embeds:int8", 0.94, 900_000, edge_seconds=0.1, cloud_seconds=0.4, needs=("embeds",))
CACHE = OperatingPoint("kv:full|int4", 0.90, 1_000_000, 0.3, 0.02, 0.02, 0.05)
SMALL = OperatingPoint("kv:q2c@0.25|int4", 0.80, 250_000, 0.3, 0.01, 0.01, 0.05)
SCOUT = OperatingPoint("scout", 0.85, 336, 0.3, cloud_seconds=0.7, needs=("held_picture",))
LOCAL = OperatingPoint("local", 0.60, 0, edge_seconds=0.5)
ALL = (IMAGE, EMBEDS, CACHE, SMALL, SCOUT, LOCAL)

POINTS = st.lists(
    st.builds(
        OperatingPoint,
        st.sampled_from(["image", "kv", "scout", "embeds", "prompt"]),
        st.floats(0, 1),
        st.integers(0, 10**7),
        *(st.floats(0, 1) for _ in range(4)),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda point: point.mode,
)


def chosen(policy, context: Context, mbit: float | None, ratios: tuple[float, ...] = (), **more) -> str:
    forecast = None if mbit is None else Forecast(1e6 * mbit, ratios)
    return decide(policy, ALL, context, forecast, **more).point.mode


def seconds(point: OperatingPoint, context: Context, mbit: float) -> float:
    return context.fixed_seconds(point) + 8 * point.nbytes / (1e6 * mbit)


@given(POINTS, st.floats(0.05, 5), st.floats(0.01, 1000), st.floats(0.1, 1))
def test_greedy_takes_the_best_that_fits(points, deadline: float, mbit: float, safety: float) -> None:
    context = Context(deadline, rtt_seconds=0.02)
    fitting = [x.quality for x in points if seconds(x, context, mbit * safety) <= deadline - 1e-9]
    try:
        point = decide(Greedy(safety), points, context, Forecast(1e6 * mbit)).point
    except DeadlineError:
        assert not fitting
        assert min(context.fixed_seconds(x) for x in points) >= deadline - 1e-9
        return
    if fitting:
        assert point.quality >= max(fitting)
        assert seconds(point, context, mbit * safety) <= deadline + 1e-9


def test_what_the_deadline_leaves() -> None:
    assert chosen(Greedy(), Context(2.0), 100) == "image"
    assert chosen(Greedy(), Context(0.55), 100) == "kv:full|int4"
    assert chosen(Greedy(), Context(0.55), 30) == "kv:q2c@0.25|int4"
    assert chosen(Greedy(), Context(0.55), 0.1) == "local"


def test_privacy_and_what_the_session_holds() -> None:
    assert chosen(Greedy(), Context(2.0, privacy=frozenset({"no-pixels"})), 100) == "embeds:int8"
    both = Context(2.0, privacy=frozenset({"no-pixels", "no-embeds"}))
    assert chosen(Greedy(), both, 100) == "kv:full|int4"
    held = Context(2.0, privacy=both.privacy, holds=frozenset({"held_picture"}))
    assert chosen(Greedy(), held, 1) == "scout"
    assert chosen(Greedy(), both, 1) == "local"


@given(
    st.lists(st.sampled_from(ALL), min_size=1, unique=True),
    st.sets(st.sampled_from(["no-pixels", "no-embeds"])),
    st.booleans(),
    st.none() | st.floats(0.001, 1000),
    st.floats(0.1, 10),
    st.sampled_from([Greedy(), RiskAware()]),
)
def test_no_choice_breaks_a_rule(points, rules, held: bool, mbit: float | None, deadline: float, policy) -> None:
    holds = frozenset({"held_picture"}) if held else frozenset()
    context = Context(deadline, privacy=frozenset(rules), holds=holds)
    link = None if mbit is None else Forecast(1e6 * mbit, (0.5, 1.0, 1.5))
    try:
        needs = decide(policy, points, context, link).point.needs
    except (DeadlineError, InputError):
        return
    assert not {f"no-{what}" for what in needs} & rules
    assert held or "held_picture" not in needs


def test_queues() -> None:
    assert chosen(Greedy(), Context(1.5), 100) == "image"
    assert chosen(Greedy(), Context(1.5, prefill_queue_seconds=1.0), 100) == "kv:full|int4"
    assert chosen(Greedy(), Context(1.5, queue_seconds=2.0), 100) == "local"


@pytest.mark.parametrize("policy", [Greedy(), RiskAware()])
def test_nothing_known_asks_least_of_the_link(policy) -> None:
    assert chosen(policy, Context(2.0), None) == "local"
    assert decide(policy, ALL[:4], Context(2.0), None).point is SMALL


@pytest.mark.parametrize("policy", [Greedy(), RiskAware(), Static("kv:full|int4")])
def test_a_deadline_that_nothing_can_meet(policy) -> None:
    with pytest.raises(DeadlineError, match=r"takes 0\.37 s besides its transfer; allow more time"):
        decide(policy, ALL, Context(0.2), Forecast(1e9))


def test_nothing_allowed() -> None:
    with pytest.raises(InputError, match="no-pixels"):
        decide(Greedy(), (IMAGE,), Context(1.0, privacy=frozenset({"no-pixels"})), None)
    with pytest.raises(InputError, match="there are none"):
        decide(Greedy(), (), Context(1.0), None)
    with pytest.raises(InputError, match="allowed point"):
        decide(Static("image"), ALL, Context(1.0, privacy=frozenset({"no-pixels"})), None)
    with pytest.raises(InputError, match="simulated"):
        decide(Oracle(), ALL, Context(1.0), None)
    with pytest.raises(InputError, match="quantile"):
        decide(RiskAware(), ALL, Context(1.0), Forecast(1e6))


def test_risk_is_bounded_by_the_forecast_s_own_error() -> None:
    """IMAGE needs 2e6 / 0.4 = 5 Mbit/s of the 10 foretold: a ratio of one half."""
    context = Context(1.0, privacy=frozenset({"no-embeds"}))
    steady, shaky = (1.0,) * 30, (1.0,) * 24 + (0.4,) * 6
    assert chosen(RiskAware(0.1), context, 10, steady) == "image"
    assert chosen(RiskAware(0.1), context, 10, shaky) == "kv:q2c@0.25|int4", "it needs a ratio of 0.32 only"
    assert chosen(RiskAware(0.3), context, 10, shaky) == "kv:q2c@0.25|int4", "0.95 * 24 / 31 is below 0.8 * 30 / 31"
    assert chosen(RiskAware(0.3), context, 10, (*shaky, *steady, *steady)) == "image"
    assert chosen(Greedy(), context, 10, shaky) == "image"
    assert chosen(RiskAware(0.1), context, 10, steady[:8]) == "local", "9 ratios are the least for a chance of 0.1"
    assert chosen(RiskAware(0.1), context, 10, steady[:9]) == "image"


def test_what_a_part_is_worth_counts_where_all_of_it_may_be_late() -> None:
    """A million bytes in 0.5 s are 16 Mbit/s of the 20 foretold; one time in four there were only 10."""
    whole = OperatingPoint("kv:full|int4", 0.9, 1_000_000)
    tiers = OperatingPoint("kv:full|int4", 0.9, 1_000_000, tiers=8, anytime=((0.2, 0.5), (0.5, 0.85)))
    small = OperatingPoint("kv:q2c@0.25|int4", 0.8, 300_000)
    shaky = Forecast(20e6, (1.0, 1.0, 1.0, 0.5) * 16)
    for point, taken in ((whole, small), (tiers, tiers)):
        assert decide(RiskAware(0.1), (point, small), Context(0.5), shaky).point is taken
    assert decide(Greedy(), (tiers, small), Context(0.5), Forecast(15e6)).point is small, "all of it, or nothing"
    assert "of use from 20% of them on" in explain(decide(RiskAware(0.1), (tiers, small), Context(0.5), shaky))


def test_hysteresis_stays_for_a_small_gain_only() -> None:
    context, steady = Context(2.0), Forecast(100e6, (1.0,) * 50)
    smaller = OperatingPoint("image:60", 0.935, 150_000, cloud_seconds=0.6, needs=("pixels",))
    for gain, last, taken in ((0.02, None, IMAGE), (0.02, smaller, smaller), (0.01, smaller, IMAGE)):
        assert decide(RiskAware(gain=gain), (IMAGE, smaller), context, steady, last).point is taken
    both = IMAGE, EMBEDS
    assert decide(RiskAware(gain=0.02), both, context, steady, EMBEDS).point is IMAGE, "it asks less and promises more"
    assert chosen(RiskAware(gain=0.02), context, 100, steady.ratios, last=CACHE) == "image"
    assert chosen(RiskAware(gain=0.02), Context(0.6), 5, steady.ratios, last=EMBEDS) != "embeds:int8"


def test_of_points_as_good_the_one_that_asks_least_of_the_link() -> None:
    """Fifty ratios of 1 say nothing of an outage: steps whose first 1 kB is a cache cost 1 kB more, and are safe."""
    large = OperatingPoint("kv:full|int4", 0.98, 100_000)
    small = OperatingPoint("kv:none|int4", 0.9, 1_000)
    steps = OperatingPoint("kv:none|int4;full|int4", 0.98, 101_000, anytime=((1_000 / 101_000, 0.9),))
    link = Forecast(10e6, (1.0,) * 50)
    for last in (None, large, steps, small):
        assert decide(RiskAware(), (large, small, steps), Context(1.0), link, last).point is steps
    assert decide(RiskAware(), (large, small), Context(1.0), link).point is large, "8 points of quality are no tie"
    assert decide(Greedy(), (large, small, steps), Context(1.0), link).point is large


def test_the_reasons() -> None:
    context = Context(0.55, privacy=frozenset({"no-embeds"}))
    text = explain(decide(Greedy(), ALL, context, Forecast(100e6, (0.5, 1.2))))
    assert text.splitlines()[0].startswith("kv:full|int4 by Greedy(safety=0.8), within 0.55 s; link: 100 Mbit/s")
    assert "0.50 to 1.20 times" in text
    assert "* kv:full|int4: quality 0.9, 1,000,000 bytes, needs 50 Mbit/s, takes 0.47 s at the foretold rate" in text
    assert "image: quality 0.95, 250,000 bytes, takes 0.6 s before a byte is sent, past the deadline" in text
    assert (
        "embeds:int8: quality 0.94, 900,000 bytes, not allowed (no-embeds: its embeds would leave the device)" in text
    )
    assert "scout: quality 0.85, 336 bytes, not allowed (the cloud does not hold the picture yet)" in text
    assert "local: quality 0.6, 0 bytes, needs no link" in text
    assert text.splitlines()[-1] == "against image it is faster above 28.57 Mbit/s"
    assert "nothing known" in explain(decide(Greedy(), ALL, context, None))


@given(POINTS.filter(lambda points: len(points) > 1), st.floats(0.01, 1e4))
def test_a_crossover_tells_who_is_faster(points, mbit: float) -> None:
    context, (one, two) = Context(1.0), points[:2]
    first, second = seconds(one, context, mbit), seconds(two, context, mbit)
    found = crossover(one, two, context)
    if abs(first - second) <= 1e-9 * (1 + first):
        return
    bound = found.bits_per_second or 0.0
    faster = {"always": True, "never": False, "below": 1e6 * mbit < bound, "above": 1e6 * mbit > bound}[found.when]
    assert faster == (first < second)


def test_bad_circumstances() -> None:
    for make in (
        lambda: Context(0),
        lambda: Context(float("nan")),
        lambda: Context(1, rtt_seconds=-1),
        lambda: Context(1, privacy=frozenset({"no-secrets"})),
        lambda: Context(1, holds=frozenset({"hands"})),
        lambda: Greedy(0),
        lambda: RiskAware(1.0),
    ):
        with pytest.raises(InputError):
            make()


def test_ways_as_text() -> None:
    assert Way.parse("greedy:0.9@ewma:0.5").policy == Greedy(0.9)
    assert Way.parse("greedy:0.9@ewma:0.5").estimator(3).predict().shape == (3,)
    assert Way.parse("risk-aware:0.2").policy == RiskAware(0.2)
    assert Way.parse("static:kv:vlcache@0.1|int4").policy == Static("kv:vlcache@0.1|int4")
    for text in ("", "brave", "greedy@guess", "greedy:x", "greedy:nan", "oracle:1", "greedy@ewma:2", "greedy:0"):
        with pytest.raises(InputError):
            Way.parse(text)


def test_unknown_rates_fit_only_what_sends_nothing() -> None:
    decision = decide(Greedy(), (CACHE, LOCAL), Context(9.0), None)
    assert decision.point is LOCAL
