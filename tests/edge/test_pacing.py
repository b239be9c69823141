"""Sending by a share: how fast, in which pieces, and what is noticed of a link that does not keep up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.edge.pacing import PIECE_SECONDS, SLACK_SECONDS, Meter, Pacer


class World:
    """A clock that only sleeping and working move on."""

    def __init__(self, rate: float | None) -> None:
        self.now, self.rate = 100.0, rate
        self.meter = Meter(lambda: self.now)
        self.pacer = Pacer(lambda: self.rate, self.meter, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def after(self, moment: float, rate: float) -> None:
        """Another rate from then on."""
        before = self.rate
        self.pacer = Pacer(lambda: rate if self.now >= moment else before, self.meter, lambda: self.now, self.sleep)

    def chunks(self, sizes: list[int], work: float = 0.0) -> Iterator[bytes]:
        for size in sizes:
            self.now += work
            yield bytes(size)


@given(st.lists(st.integers(1, 20_000), max_size=6), st.floats(1e4, 1e7))
@settings(max_examples=50)
def test_the_rate_is_kept_and_nothing_is_lost(sizes: list[int], rate: float) -> None:
    world, sent = World(rate), 0
    for piece in world.pacer.paced(world.chunks(sizes), 0.0):
        assert 8 * sent <= rate * (world.now - 100.0) * (1 + 1e-6) + 1e-6, "a piece leaves when those before have"
        assert len(piece) <= max(1500, rate / 80)
        sent += len(piece)
    assert sent == sum(sizes)


def test_a_share_changes_lapses_and_comes_back() -> None:
    world = World(8_000.0)
    pieces = world.pacer.paced(world.chunks([16_000]), 0.0)
    next(pieces), next(pieces)
    assert world.now == pytest.approx(101.5)
    world.rate = 80_000.0
    next(pieces)
    world.rate = 0.0  # no room for it any more: what is under way is finished
    before = world.now
    next(pieces)
    assert world.now - before == pytest.approx(0.15)
    world.rate = None
    before = world.now
    next(pieces), next(pieces)
    assert world.now == before
    world.rate = 80_000.0
    next(pieces), next(pieces)
    assert world.now - before == pytest.approx(0.15)


def test_a_share_that_rises_is_felt_at_once() -> None:
    """A fallback's 2.4 kbit/s become 8 Mbit/s while a piece is under way: it does not take its five seconds."""
    world = World(2_400.0)
    world.after(100.05, 8e6)
    pieces = world.pacer.paced(world.chunks([3_000]), 0.0)
    next(pieces)
    assert world.now == 100.0
    next(pieces)
    assert world.now < 100.0 + 2 * PIECE_SECONDS


@pytest.mark.parametrize(("share_of_promised", "slow"), [(1.0, False), (0.95, False), (0.5, True)])
def test_a_link_that_does_not_keep_up_is_noticed(share_of_promised: float, slow: bool) -> None:
    """100,000 bytes at 80 kbit/s take ten seconds; the link carries 80, 76 or 40."""
    world, total, told = World(80_000.0), 0, False
    got = seconds = 0.0
    for piece in world.pacer.paced(world.chunks([10_000] * 10, work=0.2), 0.0):
        total += len(piece)
        world.meter.acknowledge(int(min(total, share_of_promised * 10_000 * (world.now - 100.0))))
        nbytes, busy, late = world.meter.take()
        got, seconds, told = got + nbytes, seconds + busy, told or late
    world.now += SLACK_SECONDS
    told |= world.meter.take()[2]
    assert told == slow
    assert 8 * got / seconds == pytest.approx(80_000 * share_of_promised, rel=0.1)


def test_a_slow_encoder_is_no_slow_link() -> None:
    world, total = World(1e6), 0
    for piece in world.pacer.paced(world.chunks([20_000] * 5, work=2.0), 0.0):
        total += len(piece)
        world.meter.acknowledge(total)
    assert not world.meter.take()[2]
    world.meter.end()
    world.meter.expect(total + 1, world.now)  # from a thread that has not heard of the end yet
    world.now += 60
    assert world.meter.take() == (0, 0.0, False)


def test_bytes_before_a_share_promise_nothing() -> None:
    world = World(None)
    assert [len(x) for x in world.pacer.paced(world.chunks([30_000]), 0.0)] == [16_384, 13_616]
    world.now += 60
    assert world.meter.take()[2] is False
