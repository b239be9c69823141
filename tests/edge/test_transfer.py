"""A rate is learned from stretches in which the link, not the sender, was what held bytes up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.edge.transfer import LEAST_BYTES, Transfer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def played(events: list[tuple[float, str, int]]) -> Transfer:
    clock = Clock()
    transfer = Transfer(clock)
    for clock.now, what, total in sorted(events):
        (transfer.acknowledge if what == "acknowledge" else transfer.hand_over)(total)
    return transfer


@given(st.floats(1e4, 1e9), st.floats(0, 0.3), st.integers(1, 40))
def test_a_backlogged_sender_learns_the_rate(rate: float, rtt: float, pieces: int) -> None:
    """All is handed over at once; acknowledgements come a round trip after each piece has passed."""
    size = 8192
    events = [(0.0, "hand over", size * (i + 1)) for i in range(pieces)]
    events += [(rtt + 8 * size * (i + 1) / rate, "acknowledge", size * (i + 1)) for i in range(pieces)]
    measured = played(events).measured(rtt)
    assert measured is not None
    nbytes, seconds = measured
    assert 8 * nbytes / seconds == pytest.approx(rate, rel=1e-5)


def test_a_slow_sender_says_nothing() -> None:
    """A piece per second, each acknowledged at once: the link may be far faster than that."""
    events = [(float(i), "hand over", 10_000 * (i + 1)) for i in range(9)]
    events += [(i + 0.01, "acknowledge", 10_000 * (i + 1)) for i in range(9)]
    nbytes, seconds = played(events).measured(0.0) or (0, 1.0)
    assert (nbytes, seconds) == (10_000, pytest.approx(0.01)), "the first piece alone went out without a pause"


def test_short_messages_say_nothing() -> None:
    assert Transfer().measured(0.0) is None
    assert played([(0.0, "hand over", 100), (0.5, "acknowledge", 100)]).measured(0.0) is None
    short = [(0.0, "hand over", LEAST_BYTES), (0.5, "acknowledge", LEAST_BYTES)]
    assert played(short).measured(0.1) == (LEAST_BYTES, pytest.approx(0.4))


def test_what_was_cut_short_was_slow() -> None:
    clock = Clock()
    transfer = Transfer(clock)
    transfer.hand_over(50_000)
    clock.now = 4.0
    transfer.cut()
    assert transfer.measured(0.0) == (0, 4.0)
    done = played([(0.0, "hand over", 5_000), (1.0, "acknowledge", 5_000)])
    done.cut()
    assert done.measured(0.0) == (5_000, 1.0), "all had arrived"
