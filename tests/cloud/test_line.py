"""Who gets a place before the model, and when the others are told to come again."""

from __future__ import annotations

import pytest

from kvferry.cloud.line import LATEST, SOONEST, Line, Place
from kvferry.modes import BusyError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(line: Line, identity: str) -> float:
    with pytest.raises(BusyError, match="before this one") as busy:
        line.enter(identity)
    assert SOONEST <= busy.value.retry_seconds <= LATEST
    return busy.value.retry_seconds


def test_one_edge_may_have_all_places() -> None:
    line = Line(3, 1, Clock())
    places = [line.enter("a") for _ in range(3)]
    refused(line, "a")
    line.leave(places[0])
    line.leave(places[0])
    assert len(line) == 2
    assert isinstance(line.enter("a"), Place)


def test_who_was_refused_gets_its_share() -> None:
    """The busy one is kept from the places that fall free, until the other has come back for one, or has not."""
    clock = Clock()
    line = Line(4, 2, clock)
    places = [line.enter("busy") for _ in range(4)]
    wait = refused(line, "other")
    line.leave(places.pop())
    refused(line, "busy")
    clock.now += wait
    first = line.enter("other")
    refused(line, "busy")
    line.leave(places.pop())
    line.leave(first)
    line.enter("other")
    clock.now += 100
    assert line.enter("busy").identity == "busy"


def test_hints_follow_what_answers_take() -> None:
    line = Line(1, 1, Clock())
    line.leave(line.enter("a"), worked_seconds=2.0)
    assert line.queue_seconds == 0
    line.enter("a")
    assert line.queue_seconds == 2
    assert refused(line, "b") == 2
    assert refused(line, "c") == 4, "behind b"
    assert refused(line, "d") == 6


def test_nobody_overtakes_who_was_refused_before() -> None:
    """Whoever has just been answered and asks again waits for those who came before that."""
    clock = Clock()
    line = Line(4, 2, clock)
    inside = {who: line.enter(who) for who in "abcd"}
    for who in "ef":
        clock.now += 0.01
        refused(line, who)
    line.leave(inside["a"])
    refused(line, "a")
    refused(line, "f")
    line.enter("e")
    line.leave(inside["b"])
    refused(line, "a")
    line.enter("f")
    line.leave(inside["c"])
    assert line.enter("a").identity == "a"
