"""Messages with a chained checksum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import CorruptError
from kvferry.wire import service_pb2 as pb
from kvferry.wire.sealed import SEAL_BYTES, Opened, Seal

TOKENS = [pb.AskReply(token=pb.AskReply.Token(id=i, text=f"word{i} ")) for i in range(6)]


def sealed() -> list[bytes]:
    seal = Seal()
    return [seal.close(each) for each in TOKENS]


def read(messages: list[bytes]) -> list[pb.AskReply]:
    opened = Opened(pb.AskReply)
    return [opened.open(raw) for raw in messages]


def test_what_was_said_is_read() -> None:
    messages = sealed()
    assert read(messages) == TOKENS
    assert [len(raw) - each.ByteSize() for raw, each in zip(messages, TOKENS, strict=True)] == [SEAL_BYTES] * 6


@given(st.integers(0, 5), st.data())
def test_no_flipped_bit_is_read(which: int, data: st.DataObject) -> None:
    messages = sealed()
    bit = data.draw(st.integers(0, 8 * len(messages[which]) - 1))
    harmed = bytearray(messages[which])
    harmed[bit // 8] ^= 1 << bit % 8
    messages[which] = bytes(harmed)
    with pytest.raises(CorruptError, match="ask again"):
        read(messages)


@pytest.mark.parametrize("places", [(0, 1, 1), (0, 2), (0, 2, 1), (1,), (0, 0)])
def test_each_once_and_in_order(places: tuple[int, ...]) -> None:
    messages = sealed()
    with pytest.raises(CorruptError, match="lost or repeated"):
        read([messages[i] for i in places])


def test_without_seals() -> None:
    """A client that seals nothing is served; one that begins to in the middle was damaged at its first message."""
    plain = [each.SerializeToString() for each in TOKENS]
    assert read(plain) == TOKENS
    with pytest.raises(CorruptError):
        read([plain[0], sealed()[1]])
    with pytest.raises(CorruptError):
        read([sealed()[0], plain[1]])
    with pytest.raises(CorruptError):
        read([b"\xff" * 9])
