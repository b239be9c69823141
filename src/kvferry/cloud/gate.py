"""The way in: who asks, whether it may, and what becomes of its question when the call breaks."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from kvferry.cloud.admission import Admission
from kvferry.cloud.limits import Limits
from kvferry.cloud.monitor import DENIED, Monitor
from kvferry.cloud.passage import KEY_BYTES, Passage
from kvferry.errors import KVFerryError
from kvferry.modes import ProtocolError, mode_name
from kvferry.security.access import CALLER, Access, peer_of
from kvferry.security.tokens import Caller
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from kvferry.wire.faults import EndingError, LostError, to_wire
from kvferry.wire.sealed import next_of

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[pb.AskRequest, pb.AskReply]

MOST_SILENT = 256
"""Calls that have not said a word yet; one more ends the oldest."""
MOST_ENDED = 256
"""Answered questions whose replies are kept for an edge that comes back for them, and names of those that were given
up; one more forgets the oldest."""
LAST_WORDS_SECONDS = 0.3


class Service(Protocol):
    """What answers behind a gate: a model, or replicas of it."""

    monitor: Monitor

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:  # noqa: N802
        """What is served."""
        ...

    async def Ask(self, requests: AsyncIterator[pb.AskRequest], context: Any) -> None:  # noqa: N802
        """One question."""
        ...


class Gate(service_pb2_grpc.FerryServicer):  # type: ignore[misc]
    """Stands before the service. Health and Describe pass without standing in any line."""

    def __init__(self, service: Service, access: Access, limits: Limits, admission: Admission | None = None) -> None:
        self._service, self._access, self._limits = service, access, limits
        self._admission = admission or Admission(limits)
        self._silent: OrderedDict[asyncio.Task[pb.AskRequest | None], None] = OrderedDict()
        self._passages: dict[tuple[str, bytes], Passage] = {}
        self._ended: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._abandoned: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    async def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: Context
    ) -> pb.DescribeReply:
        await self._access.admit(context, "describe")
        return await self._service.Describe(request, context)

    async def Abandon(  # noqa: N802
        self, request: pb.AbandonRequest, context: Context
    ) -> pb.AbandonReply:
        caller = await self._access.admit(context)
        key = (caller.owner, request.passage)
        self._abandoned[key] = None  # its start may still be on the way
        while len(self._abandoned) > MOST_ENDED:
            self._abandoned.popitem(last=False)
        if (passage := self._passages.get(key)) is not None:
            passage.end()
            self._forget(passage)
        return pb.AbandonReply()

    async def Ask(  # noqa: N802
        self, requests: AsyncIterator[pb.AskRequest], context: Context
    ) -> None:
        """One question, or the rest of one, if its caller may ask it."""
        try:
            passage, messages, seen = await self._entered(requests, context)
        except grpc.aio.AbortError:
            self._refused(context, None)
            raise
        except KVFerryError as error:
            self._refused(context, error)
            await context.write(to_wire(error))
            return
        try:
            await passage.carry(context, messages, seen)
        except KVFerryError as error:
            await context.write(to_wire(error))
        finally:
            if not passage.attached and not passage.over:
                self._left_alone(passage)
            elif passage.over and not passage.resumable:
                self._forget(passage)

    async def drain(self, seconds: float) -> None:
        """Let nobody in any more, give those inside so long to finish, then tell them and end their work."""
        self._admission.ending = True
        until = asyncio.get_running_loop().time() + seconds
        while self._admission.open and (left := until - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(min(left, 0.02))
        for passage in self._admission.open:
            passage.end(EndingError("the cloud is shutting down; ask again, or ask another"))
        await asyncio.sleep(LAST_WORDS_SECONDS if self._admission.open else 0)

    async def _entered(
        self, requests: AsyncIterator[pb.AskRequest], context: Context
    ) -> tuple[Passage, AsyncIterator[pb.AskRequest], int | None]:
        """The question, the messages that are for it, and how many of its replies the edge has seen if it resumes."""
        caller = await self._access.admit(context)
        messages = aiter(requests)
        first = await self._first(messages)
        if first is None or not first.HasField("resume"):
            return await self._begun(context, caller, first), _from(first, messages), None
        if (passage := self._passages.get((caller.owner, first.resume.passage))) is None:
            raise LostError("the cloud knows nothing of that question any more; ask it again")
        return passage, messages, first.resume.replies

    def _refused(self, context: Context, error: KVFerryError | None) -> None:
        """Note a call that the service sees nothing of."""
        with self._service.monitor.request(context.time_remaining, context.invocation_metadata()) as record:
            if error is None:
                record.ended(DENIED)
            else:
                record.failed(error)

    async def _first(self, messages: AsyncIterator[pb.AskRequest]) -> pb.AskRequest | None:
        """The first message, for which a call has a few seconds; the oldest of too many silent ones has none left."""
        waiting = asyncio.create_task(next_of(messages))
        self._silent[waiting] = None
        if len(self._silent) > MOST_SILENT:
            next(iter(self._silent)).cancel()
        try:
            done, _ = await asyncio.wait({waiting}, timeout=self._limits.start_seconds)
            if not done or waiting.cancelled():
                raise ProtocolError(f"a question begins with a start, within {self._limits.start_seconds:g} s")
            return waiting.result()
        finally:
            self._silent.pop(waiting, None)
            waiting.cancel()

    async def _begun(self, context: Context, caller: Caller, first: pb.AskRequest | None) -> Passage:
        """A new question that the service works on."""
        start = first.start if first is not None and first.HasField("start") else pb.AskRequest.Start()
        if start.mode in pb.Mode.values() and start.mode:
            await self._access.check(context, caller, f"ask:{mode_name(start.mode)}")
        if start.passage and (len(start.passage) != KEY_BYTES or (caller.owner, start.passage) in self._passages):
            raise ProtocolError(f"a passage is {KEY_BYTES} bytes that were never used before; update the edge")
        if (caller.owner, start.passage) in self._abandoned:
            raise LostError("that question was given up; ask it again")
        peer = peer_of(context)
        self._admission.admit(caller, peer)
        passage = Passage(caller, peer, start.passage, self._limits.idle_seconds, partial(self._pay, caller))
        passage.identity = caller.owner or str(context.peer())
        self._admission.add(passage)
        if passage.resumable:
            self._passages[_key(passage)] = passage
        CALLER.set(caller)
        passage.begin(self._service.Ask, partial(self._done, passage))
        return passage

    def _left_alone(self, passage: Passage) -> None:
        """Its call is gone: wait for another one, but not beyond the deadline of its question."""
        left = passage.seconds_left()
        wait = min(self._limits.resume_seconds, self._limits.resume_seconds if left is None else left)
        if not passage.resumable or wait <= 0:
            passage.end()
            self._forget(passage)
            return

        def give_up() -> None:
            if not passage.attached:
                passage.end()
                self._forget(passage)

        asyncio.get_running_loop().call_later(wait, give_up)

    def _done(self, passage: Passage) -> None:
        """The service is done with it; what was said is kept for a while, for an edge that has not heard it."""
        self._admission.drop(passage)
        loop = asyncio.get_running_loop()
        if passage.complete:
            seconds = loop.time() - passage.complete_at - passage.queue_seconds
            self._admission.pay(passage.caller, "model_seconds", max(seconds, 0.0))
        if _key(passage) in self._passages:
            self._ended[_key(passage)] = None
            loop.call_later(self._limits.resume_seconds, self._forget, passage)
        while len(self._ended) > MOST_ENDED:
            self._forget(self._passages[next(iter(self._ended))])

    def _forget(self, passage: Passage) -> None:
        self._passages.pop(_key(passage), None)
        self._ended.pop(_key(passage), None)

    def _pay(self, caller: Caller, nbytes: int) -> None:
        """Count bytes, and refuse more of them once there are too many."""
        self._admission.pay(caller, "bytes", nbytes)
        self._admission.check(caller)


def _key(passage: Passage) -> tuple[str, bytes]:
    return passage.caller.owner, passage.key


async def _from(first: pb.AskRequest | None, others: AsyncIterator[pb.AskRequest]) -> AsyncIterator[pb.AskRequest]:
    if first is not None:
        yield first
        async for message in others:
            yield message
