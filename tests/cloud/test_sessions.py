"""What a cloud keeps: bounded in bytes and time, and never another's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cloud.limits import Limits
from kvferry.cloud.sessions import ID_BYTES, OVERHEAD, Sessions
from kvferry.modes import NotHeldError, ProtocolError

KB = 1024


class Clock:
    """Time that a test decides."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def room(items: int, sessions: int = 100) -> Limits:
    """For so many items of one KB in a session, and for so many in all."""
    each = KB + OVERHEAD
    return Limits(held_bytes=sessions * each, session_bytes=items * each, session_seconds=10)


def put(sessions: Sessions, session: bytes, name: str) -> tuple[bytes, int]:
    return sessions.put(session, name.encode(), name, KB)


def test_a_session_is_made_by_the_cloud() -> None:
    sessions = Sessions(room(10))
    first, handle = put(sessions, b"chosen by somebody", "a")
    assert (len(first), first != b"chosen by somebody") == (ID_BYTES, True)
    assert sessions.take(first, handle, str) == "a"
    assert put(sessions, first, "b")[0] == first
    assert put(sessions, b"", "a")[0] != first
    assert len(sessions) == 2


def test_handles_mean_nothing_elsewhere() -> None:
    sessions = Sessions(room(10))
    mine, handle = put(sessions, b"", "mine")
    theirs, same = put(sessions, b"", "theirs")
    assert handle == same
    assert sessions.take(theirs, handle, str) == "theirs"
    for session, number in ((b"", handle), (bytes(ID_BYTES), handle), (mine, handle + 1), (mine, 0)):
        with pytest.raises(NotHeldError, match="send it again"):
            sessions.take(session, number, str)
    with pytest.raises(ProtocolError, match="bytes"):
        sessions.take(mine, handle, bytes)


def test_the_same_thing_is_held_once() -> None:
    sessions = Sessions(room(10))
    session, handle = put(sessions, b"", "a")
    assert put(sessions, session, "a") == (session, handle)
    assert sessions.nbytes == KB + OVERHEAD


def test_least_recently_used_of_a_session_goes_first() -> None:
    sessions = Sessions(room(2))
    session, first = put(sessions, b"", "a")
    _, second = put(sessions, session, "b")
    sessions.take(session, first, str)
    _, third = put(sessions, session, "c")
    assert sessions.take(session, first, str) == "a"
    assert sessions.take(session, third, str) == "c"
    with pytest.raises(NotHeldError):
        sessions.take(session, second, str)
    assert put(sessions, session, "b")[1] > third  # a handle is never used again


def test_idle_sessions_make_room() -> None:
    sessions = Sessions(room(2, sessions=3))
    old, handle = put(sessions, b"", "a")
    new, _ = put(sessions, b"", "b")
    sessions.take(old, handle, str)
    put(sessions, b"", "c")
    put(sessions, b"", "d")
    assert sessions.take(old, handle, str) == "a"
    with pytest.raises(NotHeldError):
        sessions.take(new, 1, str)


def test_time_to_live() -> None:
    clock = Clock()
    sessions = Sessions(room(10), clock)
    session, handle = put(sessions, b"", "a")
    idle, _ = put(sessions, b"", "b")
    clock.now = 9
    sessions.take(session, handle, str)
    clock.now = 15
    sessions.expire()
    assert (len(sessions), sessions.nbytes) == (1, KB + OVERHEAD)
    with pytest.raises(NotHeldError):
        sessions.take(idle, 1, str)
    clock.now = 25.5
    with pytest.raises(NotHeldError):
        sessions.take(session, handle, str)


def test_dropped_is_gone_and_makes_room() -> None:
    sessions = Sessions(room(2))
    session, first = put(sessions, b"", "a")
    _, second = put(sessions, session, "b")
    sessions.drop(session, first)
    sessions.drop(session, first)
    sessions.drop(b"another", second)
    assert sessions.nbytes == KB + OVERHEAD
    with pytest.raises(NotHeldError):
        sessions.take(session, first, str)
    _, third = put(sessions, session, "c")
    assert third > second
    assert (sessions.take(session, second, str), sessions.take(session, third, str)) == ("b", "c")


def test_what_does_not_fit_is_not_held() -> None:
    sessions = Sessions(Limits(session_bytes=KB))
    assert put(sessions, b"", "a") == (b"", 0)
    assert Sessions(Limits(held_bytes=0)).put(b"", b"digest", "a", 0) == (b"", 0)
    assert len(sessions) == 0


def test_a_store_keeps_only_what_it_is_told_to() -> None:
    sessions = Sessions(room(10))
    store = sessions.store(b"", hold=False)
    store.put(b"digest", "a", KB)
    assert (store.holdings, store.session, sessions.nbytes) == ([], b"", 0)
    store = sessions.store(b"", hold=True)
    store.put(b"digest", "a", KB)
    assert store.take(store.holdings[0].handle, str) == "a"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4 * KB)), max_size=60))
def test_never_more_than_its_limits(puts: list[tuple[int, int, int]]) -> None:
    limits = Limits(held_bytes=10 * KB, session_bytes=6 * KB)
    sessions, ids = Sessions(limits), [b""] * 4
    for who, what, nbytes in puts:
        session, handle = sessions.put(ids[who], f"{what} {nbytes}".encode(), (what, nbytes), nbytes)
        ids[who] = session or ids[who]
        assert sessions.nbytes <= limits.held_bytes
        if handle:
            assert sessions.take(session, handle, tuple) == (what, nbytes)
