"""A TCP relay in user space that makes a fast local connection behave like a slow, distant one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from kvferry.errors import InputError, LinkError
from kvferry.link.address import parse_address
from kvferry.link.rate import Rate
from kvferry.link.shaper import Shaper, shaper_for

QUEUE_SECONDS = 0.05
"""How much may wait in the relay. Beyond it the relay stops reading, so that the sender feels the link."""
CATCH_UP_SECONDS = 0.25
CONNECT_SECONDS = 5.0
SOCKET_BUFFER = 64 * 1024

_clock = time.monotonic


@dataclass
class _Direction:
    """One way of the link. All connections share it, as they would share a cable."""

    shaper: Shaper
    delay: float
    delivered: int = 0


class ShapedLink:
    """A relay on ``127.0.0.1`` to ``target`` with a rate and a delay of its own in each direction.

    It runs in a thread of its own and counts every byte it delivers, so what gRPC and HTTP/2 add is counted too.

    Parameters
    ----------
    target : str
        ``host:port`` of the server. It is dialled anew for every connection.
    uplink, downlink : Rate, str, :class:`Shaper` or None
        Client to server, and back: a rate, or ``trace:NAME`` for a shipped trace or a file. None does not limit.
    delay_ms : float
        One-way delay in milliseconds, in each direction.

    Examples
    --------
    >>> with ShapedLink("127.0.0.1:7421", uplink="10mbit", delay_ms=20) as link:  # doctest: +SKIP
    ...     dial(link.address)
    """

    def __init__(
        self,
        target: str,
        uplink: Rate | str | Shaper | None = None,
        downlink: Rate | str | Shaper | None = None,
        delay_ms: float = 0.0,
    ) -> None:
        if not 0 <= delay_ms < 60_000:
            raise InputError(f"a delay is 0 or more milliseconds (below a minute), not {delay_ms}")
        self._target = parse_address(target)
        self._up = _Direction(_as_shaper(uplink), delay_ms / 1000)
        self._down = _Direction(_as_shaper(downlink), delay_ms / 1000)
        self._listener = _listen()
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kvferry-link", daemon=True)
        self._thread.start()

    @property
    def uplink_bytes(self) -> int:
        """Bytes delivered to the server so far, all connections together."""
        return self._up.delivered

    @property
    def downlink_bytes(self) -> int:
        """Bytes delivered to the client so far, all connections together."""
        return self._down.delivered

    def close(self) -> None:
        """Cut every connection and stop. Bytes still in the relay are lost."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # its loop closed a moment ago
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def __enter__(self) -> ShapedLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        connections: set[asyncio.Task[None]] = set()
        accepting = asyncio.create_task(self._accept(connections))
        await self._stop.wait()
        for task in (accepting, *connections):
            task.cancel()
        await asyncio.gather(accepting, *connections, return_exceptions=True)

    async def _accept(self, connections: set[asyncio.Task[None]]) -> None:
        with self._listener:
            while True:
                client, _ = await asyncio.get_running_loop().sock_accept(self._listener)
                task = asyncio.create_task(self._connection(client))
                connections.add(task)
                task.add_done_callback(connections.discard)

    async def _connection(self, client: socket.socket) -> None:
        """Carry one connection. It ends when the server's side ends, or when either side breaks."""
        with client, contextlib.suppress(OSError, TimeoutError, LinkError):
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with await _dial(*self._target) as server:
                up = asyncio.create_task(_carry(client, server, self._up))
                down = asyncio.create_task(_carry(server, client, self._down))
                try:
                    await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
                    if up.done() and up.exception() is None:
                        await down
                finally:
                    up.cancel()
                    down.cancel()
                    await asyncio.gather(up, down, return_exceptions=True)


async def _carry(source: socket.socket, sink: socket.socket, way: _Direction) -> None:
    """Read, schedule and deliver until ``source`` ends, then pass the end on."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(16 + int(2000 * (QUEUE_SECONDS + way.delay)))
    reading = asyncio.create_task(_read(source, queue, way))
    loop = asyncio.get_running_loop()
    try:
        while (item := await queue.get())[1]:
            due, data = item
            if (wait := due - _clock()) > 0:
                await asyncio.sleep(wait)
            way.delivered += len(data)  # before they can be seen at the far end
            await loop.sock_sendall(sink, data)
        sink.shutdown(socket.SHUT_WR)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _read(source: socket.socket, queue: asyncio.Queue[tuple[float, bytes]], way: _Direction) -> None:
    """Put pieces on the queue with the time they are due at the far end; an empty piece is the end."""
    ready = _clock()
    while True:
        data, waited = await _receive(source, way.shaper.piece_bytes)
        # What already lay in the socket counts as arrived when we meant to read it, within reason: a busy machine
        # that wakes us late then delays bytes, but does not slow the link down.
        arrived = _clock() if waited else max(ready, _clock() - CATCH_UP_SECONDS)
        leaves = way.shaper.departure(len(data), arrived)
        await queue.put((leaves + way.delay, data))
        if not data:
            return
        ready = max(arrived, leaves - QUEUE_SECONDS)
        if (wait := ready - _clock()) > 0:
            await asyncio.sleep(wait)


async def _receive(source: socket.socket, limit: int) -> tuple[bytes, bool]:
    """Up to ``limit`` bytes (none at the end, or when the connection broke) and whether they had to be waited for."""
    with contextlib.suppress(ConnectionError):
        try:
            return source.recv(limit), False
        except BlockingIOError:
            return await asyncio.get_running_loop().sock_recv(source, limit), True
    return b"", False


def _as_shaper(given: Rate | str | Shaper | None) -> Shaper:
    return shaper_for(given) if given is None or isinstance(given, str | Rate) else given


def _listen() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setblocking(False)
    return listener


async def _dial(host: str, port: int) -> socket.socket:
    """Connect to the first address of ``host`` that answers."""
    loop = asyncio.get_running_loop()
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await loop.sock_connect(sock, address)
            return sock
        except (OSError, TimeoutError):
            sock.close()
    raise LinkError(f"nothing answers at {host}:{port}")
