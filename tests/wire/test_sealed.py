"""Messages with a chained checksum."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import CorruptError
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from kvferry.wire.sealed import SEAL_BYTES, Opened, Seal, add_to_server

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


class Turned(service_pb2_grpc.FerryServicer):  # type: ignore[misc]
    """Turns every caller away before it has read a word, as a gate does without a valid token."""

    async def Ask(self, requests: AsyncIterator[pb.AskRequest], context: Any) -> None:  # noqa: N802
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")


async def turned_away() -> grpc.StatusCode:
    server = grpc.aio.server()
    add_to_server(Turned(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = service_pb2_grpc.FerryStub(channel).Ask(iter(()), timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
    finally:
        await server.stop(None)
    return refused.value.code()


def test_a_caller_who_is_turned_away_leaves_nothing_unread_behind() -> None:
    """gRPC's iterator of requests, begun and never read from, complains on stderr when it is collected."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert asyncio.run(turned_away()) is grpc.StatusCode.UNAUTHENTICATED
        gc.collect()
    assert not [str(x.message) for x in said if "never awaited" in str(x.message)]
