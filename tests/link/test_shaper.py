"""The shapers' arithmetic; no clock is involved."""

import pytest

from kvferry.link import Rate, TokenBucket, Unlimited

MBIT8 = Rate.parse("8mbit")  # a byte a microsecond


def test_serial_line() -> None:
    line = TokenBucket(MBIT8)
    assert line.departure(1000, arrived=5.0) == pytest.approx(5.001)
    assert line.departure(1000, arrived=5.0) == pytest.approx(5.002)
    assert line.departure(1000, arrived=9.0) == pytest.approx(9.001)


def test_burst_is_spent_once() -> None:
    line = TokenBucket(MBIT8, burst=2000)
    left = [line.departure(1000, arrived=5.0) for _ in range(4)]
    assert left == pytest.approx([5.0, 5.0, 5.001, 5.002])


def test_backlog_drains_at_the_rate_however_pieces_are_cut() -> None:
    coarse, fine = TokenBucket(MBIT8), TokenBucket(MBIT8)
    whole = coarse.departure(1_000_000, arrived=0.0)
    for _ in range(1000):
        last = fine.departure(1000, arrived=0.0)
    assert last == pytest.approx(whole) == pytest.approx(1.0)


def test_unlimited() -> None:
    assert Unlimited().departure(10**9, arrived=3.0) == 3.0
