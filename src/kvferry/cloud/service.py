"""The conversation, as the cloud holds it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, TypeVar

import grpc

from kvferry.checkpoint import known_as
from kvferry.cloud.costs import Budget
from kvferry.cloud.engine import Engine
from kvferry.cloud.limits import Limits
from kvferry.cloud.line import Place
from kvferry.cloud.monitor import Monitor, Record
from kvferry.cloud.sessions import Sessions, SessionShelf
from kvferry.errors import DeadlineError, InputError, KVFerryError, TruncatedError
from kvferry.modes import RECEIVERS, ProtocolError, Receiver, receiver_kind, receiver_of
from kvferry.modes.checks import cut
from kvferry.security.access import CALLER
from kvferry.telemetry import printable_id
from kvferry.telemetry.traces import span
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from kvferry.wire.faults import to_wire

if TYPE_CHECKING:
    from kvferry.cloud.store import Backing
    from kvferry.models import VLM

    Context = grpc.aio.ServicerContext[pb.AskRequest, pb.AskReply]

T = TypeVar("T")
log = logging.getLogger(__name__)
ACKNOWLEDGE_BYTES = 4 * 1024


class _TimeToAnswer(Exception):  # noqa: N818
    """What has arrived must do."""


class FerryService(service_pb2_grpc.FerryServicer):  # type: ignore[misc]
    """Answers questions on one model. Whatever goes wrong in one conversation is told to it and ends with it."""

    def __init__(
        self,
        vlm: VLM,
        engine: Engine,
        limits: Limits,
        monitor: Monitor | None = None,
        backing: Backing | None = None,
    ) -> None:
        self._vlm = vlm
        self.monitor = monitor or Monitor()
        self._engine = engine
        self._limits = limits
        self.sessions = Sessions(limits, backing=backing)
        self.budget = Budget(limits)

    async def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: object
    ) -> pb.DescribeReply:
        from kvferry import __version__

        return pb.DescribeReply(
            kvferry_version=__version__,
            model=known_as(self._vlm.name),
            fingerprint=self._vlm.fingerprint,
            has_vision=self._vlm.has_vision,
            modes=sorted(RECEIVERS),
            max_request_bytes=self._limits.request_bytes,
            max_request_seconds=self._limits.request_seconds,
            queue_seconds=self._engine.queue_seconds,
            unix_seconds=time.time(),
        )

    async def Ask(  # noqa: N802
        self, requests: AsyncIterator[pb.AskRequest], context: Context
    ) -> None:
        """One question. gRPC cancels this coroutine when the edge cancels or its deadline passes."""
        with self.monitor.request(context.time_remaining, context.invocation_metadata()) as record:
            await self.answer(requests, context, record)

    async def answer(self, requests: AsyncIterator[pb.AskRequest], context: Context, record: Record) -> None:
        """:meth:`Ask`, for whoever has begun the record."""
        shared = self._vlm, self._engine, self._limits, self.sessions, self.budget
        conversation = _Conversation(*shared, requests, context, record)
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                await conversation.hold()
        except TimeoutError:
            late = DeadlineError(
                f"the cloud gives a question {self._limits.request_seconds:g} s; send less or ask for less"
            )
            record.failed(late)
            await context.write(to_wire(late))
        except KVFerryError as error:
            record.failed(error)
            log.info("refused %s: %s: %s", conversation.name, type(error).__name__, error)
            await context.write(to_wire(error))
        except Exception as error:
            record.failed(error)
            log.exception("failed on %s", conversation.name)
            await context.write(to_wire(error))


class _Conversation:
    def __init__(
        self,
        vlm: VLM,
        engine: Engine,
        limits: Limits,
        sessions: Sessions,
        budget: Budget,
        requests: AsyncIterator[pb.AskRequest],
        context: Context,
        record: Record,
    ) -> None:
        self._budget = budget
        self.name = "a request without a start"
        self._vlm = vlm
        self._engine = engine
        self._limits = limits
        self._sessions = sessions
        self._requests = aiter(requests)
        self._write, self._time_remaining = context.write, context.time_remaining
        self._record = record
        self._identity = str(getattr(context, "identity", ""))
        self._began = time.perf_counter()
        self._received = 0
        self._decode_seconds = 0.0
        self._answer_at: float | None = None

    async def hold(self) -> None:
        """From the start to the last token, within what the request may cost."""
        with self._budget.account() as self._account:
            await self._hold()

    async def _hold(self) -> None:
        start = await self._start()
        with self._engine.place(self._identity) as place:
            owner = CALLER.get().owner
            pictures = self._engine.workshop.opener(self._account)
            store = self._sessions.store(start.session, start.hold, owner, self._account.reserve, pictures)
            receiver = await self._decode(self._receiver, start, store)
            self._check_time(receiver, start)
            turns = len(start.conversation.turns)
            accepted = pb.AskReply.Accepted(
                fingerprint=self._vlm.fingerprint, model=known_as(self._vlm.name), turns=turns
            )  # fmt: skip
            await self._write(pb.AskReply(accepted=accepted))
            with span("receive"):
                share = await self._receive(receiver, start)
            with span("answer"):
                await self._answer(receiver, store, start.max_new_tokens, share, place)

    def _receiver(self, start: pb.AskRequest.Start, store: SessionShelf) -> Receiver:
        """The first use of a mode may read weights for their fingerprint, so this runs in a thread."""
        return receiver_of(self._vlm, start, store, self._limits.request_bytes)

    async def _start(self) -> pb.AskRequest.Start:
        request = await anext(self._requests, None)
        if request is None or request.WhichOneof("part") != "start":
            raise ProtocolError("a question begins with a start; update the edge")
        start = request.start
        self.name = f"request {printable_id(start.request_id)}"
        receiver_kind(start.mode)
        self._record.started(start)
        if not 1 <= start.max_new_tokens <= self._limits.new_tokens:
            raise InputError(f"max_new_tokens is 1 to {self._limits.new_tokens} here, not {start.max_new_tokens}")
        if not 0 <= start.answer_by < math.inf:
            raise ProtocolError(f"answer_by is a number of seconds, not {start.answer_by}; update the edge")
        if start.answer_by:
            self._answer_at = asyncio.get_running_loop().time() + start.answer_by
        return start

    def _check_time(self, receiver: Receiver, start: pb.AskRequest.Start) -> None:
        """Refuse what the model cannot end in time, by what is known now."""
        left = self._limits.request_seconds - (time.perf_counter() - self._began)
        edge = self._time_remaining()
        read = getattr(receiver, "reads", 0)  # a plug-in's mode may not say
        self._engine.schedule.forecast.check(read, start.max_new_tokens, left if edge is None else min(left, edge))

    async def _receive(self, receiver: Receiver, start: pb.AskRequest.Start) -> float:
        """The share of the cache that has arrived when it is time to answer: all of it, unless that is cut short."""
        try:
            await self._receive_all(receiver, start)
        except _TimeToAnswer:
            share = await self._decode(receiver.settle)
            await self._write(pb.AskReply(enough=pb.AskReply.Enough()))
            return share
        return 1.0

    async def _next(self) -> pb.AskRequest | None:
        """The edge's next message; None where there is no more."""
        try:
            async with asyncio.timeout_at(self._answer_at):
                return await anext(self._requests, None)
        except TimeoutError:
            raise _TimeToAnswer from None

    async def _receive_all(self, receiver: Receiver, start: pb.AskRequest.Start) -> None:
        """Take in chunks until the end. They are acknowledged as they arrive, so that the edge learns of the link."""
        acknowledged = 0
        while (request := await self._next()) is not None:
            part = request.WhichOneof("part")
            if part == "end":
                if request.end.bytes != self._received:
                    raise ProtocolError(f"{self._received} of {request.end.bytes} bytes arrived; send them again")
                await self._acknowledge()
                self._check_time(receiver, start)
                await self._decode(receiver.finish)
                return
            if part != "chunk":
                raise ProtocolError("after the start come chunks and one end; update the edge")
            self._received += len(request.chunk.data)
            self._record.arrived(len(request.chunk.data))
            if self._received > self._limits.request_bytes:
                raise InputError(f"more than {self._limits.request_bytes} bytes in one request; compress more")
            if self._received - acknowledged >= ACKNOWLEDGE_BYTES:
                acknowledged = self._received
                await self._acknowledge()
            for piece in cut([request.chunk.data]):
                await self._decode(receiver.feed, piece)
        raise TruncatedError(f"the edge stopped after {self._received} bytes without an end; send them again")

    async def _decode(self, work: Callable[..., T], *arguments: object) -> T:
        """One piece of work, in a thread; what is heavy lets all others go first."""

        def counted() -> T:
            with self._account.working():
                return work(*arguments)

        began = time.perf_counter()
        result = await self._engine.decode(counted, heavy=self._account.heavy)
        self._decode_seconds += time.perf_counter() - began
        return result

    async def _acknowledge(self) -> None:
        await self._write(pb.AskReply(received=pb.AskReply.Received(bytes=self._received)))

    async def _answer(
        self, receiver: Receiver, store: SessionShelf, max_new_tokens: int, share: float, place: Place
    ) -> None:
        async with self._engine.answering(self._vlm, receiver, max_new_tokens, place) as answering:
            async for token_id, text in answering:
                await self._write(pb.AskReply(token=pb.AskReply.Token(id=token_id, text=text)))
            result = await answering.result()
        timings = pb.AskReply.Timings(
            decode=self._decode_seconds,
            queue=answering.work.queue_seconds,
            prefill=receiver.prefill_seconds,
            first_token=answering.work.first_token_seconds,
            total=time.perf_counter() - self._began,
        )
        done = pb.AskReply.Done(
            text=result.text,
            tokens=len(result.token_ids),
            bytes_received=self._received,
            timings=timings,
            session=store.session,
            holdings=store.holdings,
            share=share,
            note=receiver.note,
        )
        self._record.done(done, receiver.bf16_bytes)
        await self._write(pb.AskReply(done=done))
