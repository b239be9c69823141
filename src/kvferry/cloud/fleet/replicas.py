"""Which replicas there are, how busy they are, and which of them knows a session."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from kvferry.wire import service_pb2_grpc

OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 5_000))
REMEMBERED = 65_536
"""Sessions whose replica is remembered; the one unused for longest is forgotten, and asked for anywhere."""
DOWN_SECONDS = 1.0
"""A replica that failed is not asked for so long, unless there is no other."""


@dataclass(eq=False)
class Replica:
    """One server of the model.

    Attributes
    ----------
    open : int
        Questions that it works on.
    down_until : float
        Until then it is asked last, by :func:`time.monotonic`.
    leaving : bool
        Nothing new is asked of it.
    """

    name: str
    address: str
    channel: grpc.aio.Channel
    stub: service_pb2_grpc.FerryStub
    open: int = 0
    down_until: float = 0.0
    leaving: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def down(self) -> bool:
        """Whether it failed just now."""
        return time.monotonic() < self.down_until


class Replicas:
    """Those that a gateway may ask. Lives in one event loop."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._sessions: OrderedDict[bytes, str] = OrderedDict()
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def ready(self) -> int:
        """Those that are not known to be away."""
        return sum(not x.down and not x.leaving for x in self._replicas.values())

    async def put(self, name: str, address: str) -> None:
        """A replica is at this address now, whatever was known of it."""
        known = self._replicas.get(name)
        if known is not None and known.address == address:
            return
        await self.remove(name)
        channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._replicas[name] = Replica(name, address, channel, service_pb2_grpc.FerryStub(channel))
        async with self._changed:
            self._changed.notify_all()

    async def remove(self, name: str) -> None:
        """It is gone; what it works on fails."""
        known = self._replicas.pop(name, None)
        if known is not None:
            await known.channel.close(None)

    async def leave(self, name: str, seconds: float) -> None:
        """Ask nothing new of it, wait until it is idle or for so long, and remove it."""
        if (replica := self._replicas.get(name)) is None:
            return
        replica.leaving = True
        if replica.open:
            replica.idle.clear()
            try:
                async with asyncio.timeout(seconds):
                    await replica.idle.wait()
            except TimeoutError:
                pass
        await self.remove(name)

    @asynccontextmanager
    async def chosen(
        self, session: bytes, seconds: float, failed: Collection[str] = ()
    ) -> AsyncIterator[Replica | None]:
        """The replica that holds a session, else the least busy one; None where none came up within ``seconds``.

        Parameters
        ----------
        failed : collection of str
            Addresses that have failed on this question: they are not asked again.
        """
        until = time.monotonic() + seconds
        while (replica := self._best(session, failed)) is None and (left := until - time.monotonic()) > 0:
            async with self._changed:
                try:
                    async with asyncio.timeout(min(left, DOWN_SECONDS)):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        if replica is None:
            yield None
            return
        replica.open += 1
        try:
            yield replica
        finally:
            replica.open -= 1
            if not replica.open:
                replica.idle.set()

    def holds(self, session: bytes, replica: Replica) -> None:
        """A session is held there from now on."""
        if session:
            self._sessions[session] = replica.name
            self._sessions.move_to_end(session)
            while len(self._sessions) > REMEMBERED:
                self._sessions.popitem(last=False)

    async def close(self) -> None:
        """Close all connections."""
        for name in list(self._replicas):
            await self.remove(name)

    def _best(self, session: bytes, failed: Collection[str]) -> Replica | None:
        usable = [x for x in self._replicas.values() if not x.leaving and x.address not in failed]
        holder = next((x for x in usable if x.name == self._sessions.get(session)), None)
        if holder is not None and not holder.down:
            return holder
        return min(usable, key=lambda x: (x.down, x.open, x.name), default=None)
