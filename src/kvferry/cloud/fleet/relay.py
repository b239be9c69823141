"""The gateway's half of a question: it goes to a replica as it comes, and anew to another one where that dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from kvferry.cloud.fleet.replicas import Replica, Replicas
from kvferry.cloud.fleet.trust import Pass
from kvferry.cloud.limits import Limits
from kvferry.cloud.monitor import Monitor, Record
from kvferry.errors import DeadlineError, InputError, KVFerryError
from kvferry.modes import BusyError, NotHeldError
from kvferry.security.access import CALLER
from kvferry.telemetry import traces
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import LostError, from_wire, to_wire
from kvferry.wire.sealed import next_of

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[pb.AskRequest, pb.AskReply]

log = logging.getLogger(__name__)
ATTEMPTS = 4
"""Replicas that may die on one question."""
WAIT_SECONDS = 20.0
"""How long a question waits for a replica to come up, within its deadline."""
DIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
"""What gRPC says of a replica that is gone."""


class _Died(Exception):  # noqa: N818
    """The replica is gone."""


class Relay:
    """In a gateway what :class:`kvferry.cloud.service.FerryService` is in a cloud of one process."""

    def __init__(self, replicas: Replicas, limits: Limits, secret: str, monitor: Monitor | None = None) -> None:
        self.monitor = monitor or Monitor()
        self._replicas = replicas
        self._limits = limits
        self._secret = secret

    async def Describe(self, request: pb.DescribeRequest, context: object) -> pb.DescribeReply:  # noqa: N802
        """What the least busy replica says of itself; its clock is this machine's."""
        failed: set[str] = set()
        for _ in range(ATTEMPTS):
            async with self._replicas.chosen(b"", WAIT_SECONDS, failed) as replica:
                if replica is None:
                    break
                try:
                    reply: pb.DescribeReply = await replica.stub.Describe(
                        request, timeout=WAIT_SECONDS, metadata=Pass(self._secret, "").metadata()
                    )
                except grpc.aio.AioRpcError:
                    _mark_down(replica)
                    failed.add(replica.address)
                else:
                    reply.unix_seconds = time.time()
                    return reply
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no replica is up; ask again")  # type: ignore[attr-defined]
        raise AssertionError("abort raises")

    async def Ask(self, requests: AsyncIterator[pb.AskRequest], context: Context) -> None:  # noqa: N802
        """One question."""
        with self.monitor.request(context.time_remaining, context.invocation_metadata()) as record:
            relayed = Relayed(self._replicas, self._limits, self._secret, context, record)
            try:
                async with asyncio.timeout(self._limits.request_seconds):
                    await relayed.carry(requests)
            except TimeoutError:
                seconds = f"{self._limits.request_seconds:g}"
                late = DeadlineError(f"the cloud gives a question {seconds} s; send less or ask for less")
                record.failed(late)
                await context.write(to_wire(late))
            except KVFerryError as error:
                record.failed(error)
                await context.write(to_wire(error))


class Relayed:
    """One question under way. What has come is kept until the answer is complete, so that it can be sent anew."""

    def __init__(self, replicas: Replicas, limits: Limits, secret: str, context: Context, record: Record) -> None:
        self._replicas, self._limits, self._context, self._record = replicas, limits, context, record
        self._pass = Pass(secret, CALLER.get().owner)
        self._messages: list[pb.AskRequest] = []
        self._news = asyncio.Event()
        self._no_more = False
        self._session = b""
        self._accepted = False
        self._received = 0
        self._enough = False
        self._said: list[int] = []

    async def carry(self, requests: AsyncIterator[pb.AskRequest]) -> None:
        """To its end, by as many replicas as it takes.

        Raises
        ------
        KVFerryError
            It cannot be answered.
        """
        reading = asyncio.ensure_future(self._read(requests))
        failed: set[str] = set()
        try:
            for _ in range(ATTEMPTS):
                await self._until(reading, lambda: bool(self._messages) or self._no_more)
                async with self._replicas.chosen(self._session, WAIT_SECONDS, failed) as replica:
                    if replica is None:
                        raise BusyError("no replica is up; ask again in a while")
                    try:
                        return await self._ask(replica, reading)
                    except _Died:
                        log.warning("replica %s died; its question goes to another", replica.name)
                        failed.add(replica.address)
            raise LostError("replicas died on this question, one after the other; ask again")
        finally:
            reading.cancel()

    async def _until(self, reading: asyncio.Future[None], there: Any) -> None:
        """Wait for a message; what reading raises is raised here."""
        while not there():
            if reading.done():
                reading.result()
            self._news.clear()
            await self._news.wait()

    async def _read(self, requests: AsyncIterator[pb.AskRequest]) -> None:
        """Take in what comes, without what concerns the edge's own connection alone."""
        try:
            nbytes = 0
            async for message in requests:
                part = message.WhichOneof("part")
                if part == "start":
                    self._session = bytes(message.start.session)
                    self._record.started(message.start)
                    message.start.ClearField("passage")
                elif part == "chunk":
                    message.chunk.ClearField("offset")
                    nbytes += len(message.chunk.data)
                    if nbytes > self._limits.request_bytes:
                        raise InputError(f"more than {self._limits.request_bytes} bytes in one request; compress more")
                    self._record.arrived(len(message.chunk.data))
                self._messages.append(message)
                self._news.set()
            self._no_more = True
        finally:
            self._news.set()

    async def _outgoing(self) -> AsyncIterator[pb.AskRequest]:
        at = 0
        while True:
            while at < len(self._messages):
                yield self._messages[at]
                at += 1
            if self._no_more:
                return
            self._news.clear()
            if at == len(self._messages) and not self._no_more:
                await self._news.wait()

    async def _ask(self, replica: Replica, reading: asyncio.Future[None]) -> None:
        """The whole question, of one replica."""
        metadata = (*self._pass.metadata(), *traces.metadata())
        left = self._context.time_remaining()
        call = replica.stub.Ask(self._outgoing(), timeout=left, metadata=metadata)
        self._record.replica = replica.name
        replies = aiter(call)
        said = 0
        try:
            while True:
                reply = await self._next(replies, reading)
                if reply is None:
                    raise _Died
                part = reply.WhichOneof("part")
                if part == "token":
                    said += 1
                await self._pass_on(reply, part, said, replica)
                if part in ("done", "error"):
                    return
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineError("the deadline passed before the answer was complete") from None
            if error.code() not in DIED:
                raise BusyError(f"the replica refused ({error.details()}); ask again in a while") from None
            _mark_down(replica)
            raise _Died from None
        finally:
            call.cancel()

    async def _next(self, replies: AsyncIterator[pb.AskReply], reading: asyncio.Future[None]) -> pb.AskReply | None:
        """The replica's next reply, None after the last; or what is wrong with what comes from the edge."""
        waiting = asyncio.create_task(next_of(replies))
        try:
            while not waiting.done():
                watched: set[asyncio.Future[Any]] = {waiting} if reading.done() else {waiting, reading}
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                if reading.done() and not waiting.done():
                    reading.result()
            return None if waiting.cancelled() else waiting.result()  # its connection was closed here
        finally:
            waiting.cancel()

    async def _pass_on(self, reply: pb.AskReply, part: str | None, said: int, replica: Replica) -> None:
        """Say to the edge what it has not heard yet from another replica.

        Raises
        ------
        LostError
            This replica does not say what the edge has heard already.
        """
        again = len(self._said)
        if part == "accepted":
            if self._accepted:
                return
            self._accepted = True
        elif part == "received":
            if reply.received.bytes <= self._received:
                return
            self._received = reply.received.bytes
        elif part == "enough":
            if self._enough:
                return
            self._enough = True
        elif part == "token":
            if said <= again:
                if reply.token.id != self._said[said - 1]:
                    raise LostError("a replica died and another would have gone on differently; ask again")
                return
            self._said.append(reply.token.id)
        elif part == "done":
            if said < again:
                raise LostError("a replica died and another would have gone on differently; ask again")
            self._replicas.holds(bytes(reply.done.session), replica)
            self._record.done(reply.done, 0)
        elif part == "error":
            error = from_wire(reply.error)
            if self._said and not isinstance(error, NotHeldError):  # with that the edge sends all of it again
                raise LostError(f"a replica died, and another one could not go on ({error}); ask again")
            self._record.failed(error)
        await self._context.write(reply)


def _mark_down(replica: Replica) -> None:
    from kvferry.cloud.fleet.replicas import DOWN_SECONDS

    replica.down_until = time.monotonic() + DOWN_SECONDS
