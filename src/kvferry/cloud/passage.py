"""One question apart from the call that it came by, so that another call can take it over where the first one broke."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from kvferry.errors import DeadlineError, KVFerryError
from kvferry.modes import ProtocolError
from kvferry.security.tokens import Caller
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import to_wire

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[pb.AskRequest, pb.AskReply]

KEY_BYTES = 16
BEAT_SECONDS = 2.0
BREAK_SECONDS = 0.2
"""After the requests of a call have ended because it broke, gRPC says so within this time."""
UNNUMBERED = ("received", "resumed", "beat")
"""Replies that are not said again: what they say is in Resumed, or is nothing."""


class Passage:
    """A question under way. To the service it is the call: an iterator of requests, and a context to write to.

    Parameters
    ----------
    caller, peer
        Who asked, and from which machine.
    key : bytes
        What another call must know to take it over; only this edge knows it. Empty: it ends with its call.
    idle_seconds : float
        How long the edge may be silent before it has sent everything.
    pay : callable
        Is told of bytes as they come; may raise.

    Attributes
    ----------
    received : int
        Bytes of chunks that were passed on.
    complete : bool
        The End was passed on.
    heard_at : float
        When the last byte came, by the loop's clock.
    """

    def __init__(self, caller: Caller, peer: str, key: bytes, idle_seconds: float, pay: Callable[[int], None]) -> None:
        self.key = key
        self.caller, self.peer = caller, peer
        self.identity = caller.owner or peer
        self.received, self.complete, self.over = 0, False, False
        self._loop = asyncio.get_running_loop()
        self.heard_at = self.complete_at = self._loop.time()
        self.queue_seconds = 0.0
        self._idle_seconds, self._pay = idle_seconds, pay
        self._requests: asyncio.Queue[pb.AskRequest | KVFerryError | None] = asyncio.Queue(1)
        self._history: list[pb.AskReply] = []
        self._outgoing: deque[pb.AskReply] = deque()
        self._news = asyncio.Event()
        self._call = 0
        self._context: Any = None
        self._listening: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._final: pb.AskReply | None = None
        self._status: tuple[Any, ...] | None = None
        self._deadline: float | None = None

    @property
    def attached(self) -> bool:
        """Whether a call carries it now."""
        return self._listening is not None

    @property
    def resumable(self) -> bool:
        """Whether it waits for another call when its own is gone."""
        return bool(self.key)

    def begin(self, service: Callable[[Any, Any], Coroutine[Any, Any, None]], ended: Callable[[], None]) -> None:
        """Let the service work on it; ``ended`` is called when it has."""
        self._task = self._loop.create_task(self._run(service))
        self._task.add_done_callback(lambda _: ended())

    def end(self, error: KVFerryError | None = None) -> None:
        """Stop the work on it at once; ``error`` is its last reply, where anybody hears it."""
        if self._task is not None and not self.over:
            self._final = None if error is None else to_wire(error)
            self._task.cancel()

    async def carry(self, context: Context, messages: AsyncIterator[pb.AskRequest], seen: int | None = None) -> None:
        """Carry it by this call, until one of them ends. A call before this one ends.

        Parameters
        ----------
        seen : int or None
            The call resumes, and so many of the numbered replies are known at the other end.
        """
        me = self._call = self._call + 1
        if self._listening is not None:  # what it has passed on must be known before the edge is told
            self._listening.cancel()
            await asyncio.wait([self._listening])
        if self._call != me:
            return
        self._context, left = context, context.time_remaining()
        self._deadline = None if left is None else self._loop.time() + left
        self._news.set()
        self._outgoing.clear()
        if seen is not None:
            if seen > len(self._history):
                raise ProtocolError(f"{seen} replies were never said; update the edge")
            self._outgoing.append(pb.AskReply(resumed=pb.AskReply.Resumed(bytes=self.received, complete=self.complete)))
            self._outgoing.extend(self._history[seen:])
            self.heard_at = self._loop.time()
        self._listening = listening = self._loop.create_task(self._listen(messages))
        try:
            await self._speak(context, me)
        finally:
            listening.cancel()
            if self._call == me:
                self._listening = None
                self._outgoing.clear()

    def seconds_left(self) -> float | None:
        """Of the deadline of its last call."""
        return None if self._deadline is None else self._deadline - self._loop.time()

    # what the service sees

    def __aiter__(self) -> Passage:
        return self

    async def __anext__(self) -> pb.AskRequest:
        message = await self._requests.get()
        if message is None:
            self._requests.put_nowait(None)
            raise StopAsyncIteration
        if isinstance(message, KVFerryError):
            raise message
        return message

    async def write(self, reply: pb.AskReply) -> None:
        """Say something to the edge, now or when it is back."""
        part = reply.WhichOneof("part")
        if part == "accepted" and self.resumable:
            reply.accepted.beat_seconds = BEAT_SECONDS
        elif part == "done":
            self.queue_seconds = reply.done.timings.queue
        if part not in UNNUMBERED:
            self._history.append(reply)
        if self.attached:
            self._outgoing.append(reply)
            self._news.set()

    def time_remaining(self) -> float | None:
        """See :meth:`grpc.aio.ServicerContext.time_remaining`."""
        return self.seconds_left()

    async def abort(self, *status: Any) -> NoReturn:
        """See :meth:`grpc.aio.ServicerContext.abort`."""
        self._status = status
        raise grpc.aio.AbortError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    # what its call does

    async def _run(self, service: Callable[[Any, Any], Coroutine[Any, Any, None]]) -> None:
        try:
            await service(self, self)
        except asyncio.CancelledError:
            if self._final is not None:
                await self.write(self._final)
        except grpc.aio.AbortError:
            pass
        finally:
            self.over = True
            self._news.set()

    async def _listen(self, messages: AsyncIterator[pb.AskRequest]) -> None:
        try:
            while not self.over:
                message = await self._next(messages)
                part = None if message is None else message.WhichOneof("part")
                if message is None:
                    await self._no_more()
                    return
                if part == "chunk" and not self._is_new(message.chunk):
                    continue
                if part == "chunk":
                    self._pay(len(message.chunk.data))
                if part != "beat":
                    await self._requests.put(message)
                    self._passed_on(message)
        except KVFerryError as error:
            await self._requests.put(error)

    async def _next(self, messages: AsyncIterator[pb.AskRequest]) -> pb.AskRequest | None:
        if self.complete:
            return await anext(messages, None)
        try:
            async with asyncio.timeout(self._idle_seconds):
                return await anext(messages, None)
        except TimeoutError:
            raise DeadlineError(f"nothing came from the edge for {self._idle_seconds:g} s; ask again") from None

    async def _no_more(self) -> None:
        """The edge says no more, or its connection broke, which looks the same here and in a moment no more."""
        if not self.complete:
            await asyncio.sleep(self._idle_seconds if self.resumable else BREAK_SECONDS)
        await self._requests.put(None)

    def _is_new(self, chunk: pb.AskRequest.Chunk) -> bool:
        """Whether some of its bytes are; those that are not are cut off."""
        if not chunk.HasField("offset"):
            return True
        if chunk.offset > self.received:
            raise ProtocolError(f"bytes {self.received} to {chunk.offset} are missing; send them first")
        known = self.received - chunk.offset
        if known >= len(chunk.data) > 0:
            return False
        chunk.data = chunk.data[known:]
        return True

    def _passed_on(self, message: pb.AskRequest) -> None:
        self.heard_at = self._loop.time()
        self.received += len(message.chunk.data)
        if message.HasField("end"):
            self.complete, self.complete_at = True, self.heard_at

    async def _speak(self, context: Context, me: int) -> None:
        beat = pb.AskReply(beat=pb.AskReply.Beat())
        while self._call == me:
            self._news.clear()
            while self._outgoing and self._call == me:
                await context.write(self._outgoing.popleft())
            if self.over:
                if self._status is not None:
                    await context.abort(*self._status)
                return
            try:
                async with asyncio.timeout(BEAT_SECONDS if self.resumable and self._history else None):
                    await self._news.wait()
            except TimeoutError:
                await context.write(beat)
