"""Messages with a chained checksum: what was damaged, lost, repeated or exchanged on the way is found out.

TCP's own checksum misses one damaged segment in some millions (J. Stone and C. Partridge, "When the CRC and TCP
Checksum Disagree", SIGCOMM 2000), and boxes between two ends compute it anew. Bitstreams and pictures carry their own;
a question and an answer do not. It is no protection against who changes messages on purpose: TLS is.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any, Generic, TypeVar

import google_crc32c
import grpc
from google.protobuf.message import DecodeError, Message

from kvferry.errors import CorruptError
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc

SEAL = struct.Struct("<BI")
SEAL_BYTES = SEAL.size
TAG = pb.AskRequest.CHECKSUM_FIELD_NUMBER << 3 | 5
"""Of a fixed32 field on the wire, in one byte."""
SERVICE = pb.DESCRIPTOR.services_by_name["Ferry"].full_name
M = TypeVar("M", pb.AskRequest, pb.AskReply)


class Seal:
    """Of one direction of one call, at one of its ends."""

    def __init__(self) -> None:
        self._chain = 0

    def close(self, message: Message) -> bytes:
        """The message on the wire."""
        body = message.SerializeToString()
        self._chain = google_crc32c.extend(self._chain, body)
        return bytes(body) + SEAL.pack(TAG, self._chain)

    def check(self, raw: bytes) -> None:
        """CorruptError unless these bytes are what the other end sent next."""
        body = raw[:-SEAL_BYTES]
        self._chain = google_crc32c.extend(self._chain, body)
        if raw[len(body) :] != SEAL.pack(TAG, self._chain):
            raise CorruptError("a message was damaged, lost or repeated on the way; ask again")


class Opened(Generic[M]):
    """Messages of one kind as they come in; ``sealed`` is known from the first on, and the same for all."""

    def __init__(self, kind: type[M]) -> None:
        self.sealed: bool | None = None
        self._kind: type[M] = kind
        self._seal = Seal()

    def open(self, raw: bytes) -> M:
        """The message in ``raw``.

        Raises
        ------
        CorruptError
            It is not what was sent, or no message.
        """
        try:
            message: M = self._kind.FromString(raw)
        except DecodeError:
            raise CorruptError("a message was damaged on the way; ask again") from None
        if self.sealed is None:
            self.sealed = message.HasField("checksum")
        if self.sealed:
            self._seal.check(raw)
        elif message.HasField("checksum"):
            raise CorruptError("a message was damaged on the way; ask again")
        message.ClearField("checksum")
        return message


class SealedCall:
    """A call of :meth:`Ask` at the edge; iterate over its replies. All else is gRPC's call."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._opened = Opened(pb.AskReply)

    def __iter__(self) -> Iterator[pb.AskReply]:
        return self

    def __next__(self) -> pb.AskReply:
        reply = self._opened.open(next(self._call))
        if not self._opened.sealed:
            self._call.cancel()
            raise CorruptError("a message was damaged on the way, or the cloud is older than this edge; update it")
        return reply

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


class SealedStub(service_pb2_grpc.FerryStub):  # type: ignore[misc]
    """The service as an edge calls it, with seals on both directions of :meth:`Ask`."""

    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__(channel)
        raw = channel.stream_stream(f"/{SERVICE}/Ask", bytes, bytes)

        def ask(requests: Iterator[pb.AskRequest], **options: Any) -> SealedCall:
            seal = Seal()
            return SealedCall(raw((seal.close(each) for each in requests), **options))

        self.Ask = ask


class _Messages:
    """Requests as they come in. No generator: one that is cancelled while it waits would be at its end. And no
    ``aiter`` before somebody reads: it would begin gRPC's own generator, which complains on stderr where nobody does.
    """

    def __init__(self, requests: AsyncIterator[bytes], opened: Opened[pb.AskRequest]) -> None:
        self._requests = requests
        self._opened = opened

    def __aiter__(self) -> AsyncIterator[pb.AskRequest]:
        return self

    async def __anext__(self) -> pb.AskRequest:
        return self._opened.open(await anext(self._requests))


class _Context:
    """gRPC's context, whose ``write`` takes a message and seals it where the requests are sealed."""

    def __init__(self, context: Any, opened: Opened[pb.AskRequest]) -> None:
        self._context = context
        self._opened = opened
        self._seal = Seal()

    async def write(self, reply: pb.AskReply) -> None:
        await self._context.write(self._seal.close(reply) if self._opened.sealed else reply.SerializeToString())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def add_to_server(servicer: service_pb2_grpc.FerryServicer, server: grpc.aio.Server) -> None:
    """Like the generated function, with seals on both directions of ``Ask`` for those who seal theirs."""

    async def ask(requests: AsyncIterator[bytes], context: Any) -> None:
        opened = Opened(pb.AskRequest)
        await servicer.Ask(_Messages(requests, opened), _Context(context, opened))

    known = _Handlers()
    service_pb2_grpc.add_FerryServicer_to_server(servicer, known)
    handlers: dict[str, Any] = {**known.handlers, "Ask": grpc.stream_stream_rpc_method_handler(ask)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class _Handlers:
    """Takes what the generated function would register with a server."""

    def __init__(self) -> None:
        self.handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same methods once more."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """By their names."""
        self.handlers.update(handlers)


async def next_of(messages: AsyncIterator[M]) -> M | None:
    """The next message, or None after the last. Nothing is begun where a task with it is cancelled before its first
    step.
    """
    return await anext(messages, None)
