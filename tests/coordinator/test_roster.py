"""Who shares a link and by how much, by a clock that the test sets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.coordinator import Capacity, Roster, bound_of
from kvferry.coordinator.roster import MAX_MEMBERS, NOTABLE, Member
from kvferry.errors import InputError
from kvferry.modes import BusyError
from kvferry.policy import Context, OperatingPoint
from kvferry.policy.allocation import ALLOCATORS, Agent

LARGE, SMALL = OperatingPoint("kv:full|int4", 0.9, 100_000), OperatingPoint("kv:full|int2", 0.5, 10_000)
SCOUT = OperatingPoint("scout", 0.3, 300)


class Clock:
    """Time that a test decides."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def roster(uplink: str, method: str = "quality", clock: Clock | None = None, idle: float = 60.0) -> Roster:
    return Roster(ALLOCATORS[method], Capacity(bound_of(uplink)), 3.0, idle, clock or Clock())


def agent(*points: OperatingPoint, deadline: float = 1.0) -> Agent:
    return Agent("a", points or (LARGE, SMALL), Context(deadline))


def join(book: Roster, who: Agent) -> tuple[Member, list[int]]:
    """A member, and an entry for each time that it was notified."""
    told: list[int] = []
    return book.join(who, lambda: told.append(1)), told


def test_agents_come_and_go() -> None:
    """In a second the large one takes 0.8 Mbit/s, the small one 0.08, and 0.8 of 1.25 are counted on."""
    book = roster("1.25mbit")
    one, told = join(book, agent())
    assert (one.share.bits_per_second, one.share.mode) == (1.25e6, LARGE.mode)
    two, _ = join(book, agent())
    assert sorted([one.share.mode, two.share.mode]) == sorted([LARGE.mode, SMALL.mode])
    assert one.share.bits_per_second + two.share.bits_per_second == pytest.approx(1.25e6)
    assert one.share.members == 2
    book.change(two, agent(SCOUT))
    assert (one.share.mode, two.share.mode) == (LARGE.mode, SCOUT.mode)
    book.leave(two)
    book.leave(two)
    assert one.share.bits_per_second == 1.25e6
    assert one.share.version == len(told) > 2
    before = one.share
    book.tick()
    assert one.share == before, "nothing has changed"


def test_silence_ends_a_lease() -> None:
    clock = Clock()
    book = roster("1mbit", clock=clock)
    one, two = join(book, agent())[0], join(book, agent())[0]
    clock.now = 2.9
    book.hear(one, 0, 0.0, False)
    book.tick()
    assert len(book.members) == 2
    clock.now = 3.1
    book.tick()
    assert book.members == [one]
    assert two.gone
    assert not one.gone
    assert one.share.bits_per_second == 1e6


def test_who_asks_nothing_rests_until_it_asks() -> None:
    """Its fallback of 300 bytes in a second is kept for it, with the margin of every share; the others get the rest."""
    clock = Clock()
    book = roster("1.25mbit", clock=clock, idle=2.0)
    one, told = join(book, agent(LARGE, SMALL, SCOUT))
    two, _ = join(book, agent(LARGE, SMALL))
    book.hear(two, 0, 0.0, False, asking=True)
    for clock.now in (1.0, 2.0, 2.5):
        book.hear(one, 0, 0.0, False)
        book.tick()
    assert (one.share.resting, one.share.mode, one.share.members) == (True, SCOUT.mode, 2)
    assert one.share.bits_per_second == pytest.approx(8 * 300 / 0.8)
    assert (two.share.resting, two.share.mode) == (False, LARGE.mode)
    assert two.share.bits_per_second == pytest.approx(1.25e6 - 8 * 300 / 0.8)
    before = len(told)
    book.hear(two, 0, 0.0, False, asking=True)
    book.hear(one, 0, 0.0, False, asking=True)
    assert len(told) == before + 1, "told at once, not with the next tick"
    assert not one.share.resting
    assert one.share.bits_per_second + two.share.bits_per_second == pytest.approx(1.25e6)
    clock.now = 5.3
    book.tick()
    assert (one.share.resting, two.share.resting) == (False, False), "their questions have not ended"
    book.hear(one, 0, 0.0, False)
    book.hear(two, 0, 0.0, False)
    for clock.now in (7.0, 7.4):
        book.tick()
    assert (one.share.resting, two.share.resting) == (True, True)
    assert (two.share.bits_per_second, two.share.mode) == (0.0, ""), "it has no fallback"
    book.hear(two, 1000, 0.5, False)
    assert two.share.mode == LARGE.mode, "who sends asks, even if it does not say so"
    book.change(one, agent(SMALL, SCOUT))
    assert not one.share.resting


@pytest.mark.parametrize("method", ALLOCATORS)
@given(
    crowd=st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0.3, 5)), min_size=1, max_size=8),
    mbit=st.floats(0.001, 10),
)
@settings(max_examples=30)
def test_rest_takes_nothing_from_who_asks(method: str, crowd: list[tuple[bool, bool, float]], mbit: float) -> None:
    """Whoever rests beside them: the sum fits, who rests has a fallback's rate or none, nobody else loses the last."""
    clock = Clock()
    book = roster(f"{mbit:.6f}mbit", method, clock, idle=1.0)
    for _, has_fallback, deadline in crowd:
        join(book, agent(LARGE, SMALL, *([SCOUT] if has_fallback else []), deadline=deadline))
    clock.now = 1.5
    for member, (rests, _, _) in zip(book.members, crowd, strict=True):
        book.hear(member, 0, 0.0, False, asking=not rests)
    book.tick()
    assert sum(x.share.bits_per_second for x in book.members) <= 1e6 * mbit * (1 + NOTABLE)
    asking = [x for x in book.members if not x.share.resting]
    assert len(asking) == sum(not rests for rests, _, _ in crowd)
    for member in book.members:
        least = 8 * SCOUT.nbytes / member.agent.context.deadline / 0.8
        if member.share.resting:
            assert member.share.bits_per_second == pytest.approx(least if member.share.mode else 0.0)
    needed = sum(8 * SCOUT.nbytes / x.agent.context.deadline for x in asking)
    if all(SCOUT in x.agent.points for x in asking) and needed <= 0.79e6 * mbit:
        assert all(x.share.mode for x in asking)


@pytest.mark.parametrize("method", ALLOCATORS)
@given(crowd=st.lists(st.tuples(st.booleans(), st.floats(0.3, 5)), min_size=1, max_size=8), mbit=st.floats(0.001, 10))
@settings(max_examples=30)
def test_shares_fit_the_uplink_and_the_deadlines(method: str, crowd: list[tuple[bool, float]], mbit: float) -> None:
    mbit = round(mbit, 6)
    book = roster(f"{mbit:.6f}mbit", method)
    for has_fallback, deadline in crowd:
        join(book, agent(LARGE, SMALL, *([SCOUT] if has_fallback else []), deadline=deadline))
    rates = [member.share.bits_per_second for member in book.members]
    assert sum(rates) <= 1e6 * mbit * (1 + 1e-5)
    for member in book.members:
        point = next((x for x in member.agent.points if x.mode == member.share.mode), None)
        if point is not None:
            assert 8 * point.nbytes / member.share.bits_per_second <= member.agent.context.deadline * 0.81
    needed = sum(8 * SCOUT.nbytes / deadline for _, deadline in crowd)
    if all(has_fallback for has_fallback, _ in crowd) and needed <= 0.79e6 * mbit:
        assert all(member.share.mode for member in book.members)


def test_a_crowd_is_refused() -> None:
    book = roster("1mbit")
    for _ in range(MAX_MEMBERS):
        join(book, agent(SCOUT))
    with pytest.raises(BusyError, match="another"):
        join(book, agent())


def test_what_is_measured_is_shared_out() -> None:
    """Two agents get 300 and 200 kbit/s through and are slow: the link has half a megabit, whatever was configured."""
    clock = Clock()
    book = roster("800kbit", clock=clock)
    one, two = join(book, agent(SCOUT))[0], join(book, agent(SCOUT))[0]
    for member, rate in ((one, 300e3), (two, 200e3)):
        book.hear(member, int(rate / 8), 1.0, member is one)
    book.tick()
    assert one.share.bits_per_second + two.share.bits_per_second == pytest.approx(450e3)
    told = book.capacity.at(0)
    book.tick()
    assert told < book.capacity.at(0) < 1.06 * told, "slow is told once"
    for _ in range(30):
        book.tick()
    assert book.capacity.at(0) == 800e3
    clock.now = 1.0
    book.hear(one, 10, 1.0, True)
    book.hear(two, 0, 0.0, False)
    book.tick()
    assert book.capacity.at(0) == 400e3, "so few bytes may be all that was asked of it"
    book.hear(one, 10, 1.0, False)
    book.tick()
    assert book.capacity.at(0) == pytest.approx(420e3)


def test_the_bound_follows_a_trace() -> None:
    steady = bound_of("trace:steady")
    assert steady(0.0) == pytest.approx(6e6, rel=0.01)
    outages = bound_of("trace:outages")
    rates = [outages(0.5 * second) for second in range(60)]
    assert min(rates) == 1.0
    assert max(rates) == pytest.approx(6e6, rel=0.01)
    for wrong in ("fast", "trace:nowhere"):
        with pytest.raises(InputError):
            bound_of(wrong)
