"""The coordinator's process: one gRPC service, one call per member."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc

from kvferry.coordinator.capacity import Capacity, bound_of
from kvferry.coordinator.roster import Member, Roster
from kvferry.errors import InputError, KVFerryError, LinkError
from kvferry.link import parse_address
from kvferry.policy import Context, OperatingPoint
from kvferry.policy.allocation import ALLOCATORS, Agent
from kvferry.security import ServerKeys, Tokens
from kvferry.security.access import Access, on_hangup
from kvferry.security.tls import bind
from kvferry.wire import coordinate_pb2 as pb
from kvferry.wire import coordinate_pb2_grpc
from kvferry.wire.faults import ProtocolError, to_wire

log = logging.getLogger(__name__)
TICK_SECONDS = 0.5
GRACE_SECONDS = 1.0
MAX_POINTS = 32
MAX_NAME = 64
MESSAGE_BYTES = 64 * 1024
OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class CoordinatorService(coordinate_pb2_grpc.CoordinatorServicer):  # type: ignore[misc]
    """Members' calls. What goes wrong in one is told to it and ends with it."""

    def __init__(self, roster: Roster, access: Access | None = None) -> None:
        self._roster = roster
        self.access = access or Access()

    async def Share(  # noqa: N802
        self,
        requests: AsyncIterator[pb.AgentMessage],
        context: grpc.aio.ServicerContext[pb.AgentMessage, pb.CoordinatorMessage],
    ) -> None:
        """One membership; it ends with the call, or when the agent has been silent for a lease."""
        await self.access.admit(context, "share")
        messages, news, writing = aiter(requests), asyncio.Event(), asyncio.Lock()
        member: Member | None = None
        try:
            member = self._roster.join(_agent(await anext(messages, None)), news.set)
            log.info("%s joined", member.agent.name)
            listening = asyncio.create_task(self._listen(member, messages, news))
            speaking = asyncio.create_task(self._speak(member, news, context, writing))
            try:
                done, _ = await asyncio.wait({listening, speaking}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                listening.cancel()
                async with writing:  # a write that is cut off would stand in the way of the last one
                    speaking.cancel()
        except KVFerryError as error:
            log.info("refused: %s: %s", type(error).__name__, error)
            await context.write(pb.CoordinatorMessage(error=to_wire(error).error))
        finally:
            if member is not None:
                log.info("%s left", member.agent.name)
                self._roster.leave(member)

    async def _listen(self, member: Member, messages: AsyncIterator[pb.AgentMessage], news: asyncio.Event) -> None:
        async for message in messages:
            part = message.WhichOneof("part")
            if part == "join":
                self._roster.change(member, _agent(message))
            elif part == "report":
                report = message.report
                if not 0 <= report.seconds < math.inf:
                    raise InputError(f"a report is about 0 or more seconds, not {report.seconds}")
                self._roster.hear(member, report.bytes, report.seconds, report.slow, report.asking)
            else:
                raise ProtocolError("a member sends joins and reports; update the edge")
            news.set()

    async def _speak(
        self,
        member: Member,
        news: asyncio.Event,
        context: grpc.aio.ServicerContext[pb.AgentMessage, pb.CoordinatorMessage],
        writing: asyncio.Lock,
    ) -> None:
        while True:
            await news.wait()
            news.clear()
            if member.gone:
                raise LinkError(f"nothing was heard of {member.agent.name} for a lease; join again")
            share = member.share
            message = pb.CoordinatorMessage.Share(
                version=share.version,
                bits_per_second=share.bits_per_second,
                mode=share.mode,
                lease_seconds=self._roster.lease_seconds,
                members=share.members,
                resting=share.resting,
            )
            async with writing:
                await context.write(pb.CoordinatorMessage(share=message))


def _agent(message: pb.AgentMessage | None) -> Agent:
    """What an agent says of itself, checked.

    Raises
    ------
    ProtocolError, InputError
    """
    if message is None or message.WhichOneof("part") != "join":
        raise ProtocolError("a membership begins with a join; update the edge")
    join = message.join
    if not 1 <= len(join.points) <= MAX_POINTS:
        raise InputError(f"an agent joins with 1 to {MAX_POINTS} points, not {len(join.points)}; choose among them")
    points = tuple(OperatingPoint(x.mode, x.quality, x.bytes, edge_seconds=x.seconds) for x in join.points)
    return Agent(join.name[:MAX_NAME] or "an agent", points, Context(join.deadline))


def coordinate(
    uplink: str,
    listen: str = "127.0.0.1:7422",
    *,
    method: str = "quality",
    lease_seconds: float = 3.0,
    idle_seconds: float = 10.0,
    on_ready: Callable[[str], None] | None = None,
    keys: ServerKeys | None = None,
    tokens: str | Path | None = None,
    insecure: bool = False,
) -> None:
    """Share an uplink out until SIGINT or SIGTERM.

    Parameters
    ----------
    uplink : str
        A rate, or ``trace:NAME``: the most that is ever shared out.
    listen : str
        ``host:port``; port 0 takes a free one.
    method : str
        Key of :data:`kvferry.policy.allocation.ALLOCATORS`.
    lease_seconds : float
        Who is silent for so long is a member no more.
    idle_seconds : float
        Who asks nothing for so long is granted only what its fallback takes, until it asks again.
    on_ready : callable
        Called with the address listened on.
    keys, tokens, insecure
        As :func:`kvferry.cloud.serve` has them; a token needs the scope ``share``.

    Raises
    ------
    InputError
        The uplink, the method, the lease, the idle time or the address is none; without TLS on an address that other
        machines can reach.
    LinkError
        The port is taken or the host is not ours.
    """
    if method not in ALLOCATORS:
        raise InputError(f"there is no method {method!r}; use {', '.join(ALLOCATORS)}")
    if not 1 <= lease_seconds <= 3600:
        raise InputError(f"a lease is 1 to 3600 seconds, not {lease_seconds}")
    if not 1 <= idle_seconds <= 86_400:
        raise InputError(f"a member rests after 1 to 86,400 seconds without a question, not {idle_seconds}")
    parse_address(listen)
    began, capacity = time.monotonic(), Capacity(bound_of(uplink))
    roster = Roster(ALLOCATORS[method], capacity, lease_seconds, idle_seconds, lambda: time.monotonic() - began)
    access = Access(None if tokens is None else Tokens(tokens))
    asyncio.run(_serve(CoordinatorService(roster, access), roster, listen, on_ready, keys, insecure))


async def _serve(
    service: CoordinatorService,
    roster: Roster,
    listen: str,
    on_ready: Callable[[str], None] | None,
    keys: ServerKeys | None,
    insecure: bool,
) -> None:
    if service.access.tokens is not None:
        on_hangup(service.access.tokens.reload)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError):  # not on this system, or not in this thread
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = grpc.aio.server(options=OPTIONS)
    coordinate_pb2_grpc.add_CoordinatorServicer_to_server(service, server)
    address = bind(server, listen, keys, insecure)
    await server.start()
    ticking = asyncio.create_task(_tick(roster))
    try:
        if on_ready is not None:
            on_ready(address)
        await stop.wait()
    finally:
        ticking.cancel()
        await server.stop(GRACE_SECONDS)


async def _tick(roster: Roster) -> None:
    while True:
        await asyncio.sleep(TICK_SECONDS)
        roster.tick()
