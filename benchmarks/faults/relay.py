"""A TCP relay that does harm once, at a byte that is chosen beforehand."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kvferry.link import parse_address

PIECE = 64 * 1024
LORIS_SECONDS = 0.02
DELAY_SECONDS = 0.4
RESET = struct.pack("ii", 1, 0)

Way = Literal["up", "down"]


@dataclass
class Connection:
    """Both sockets of one connection, and what a fault has made of it."""

    client: socket.socket
    server: socket.socket
    rng: random.Random
    swallow: set[Way] = field(default_factory=set)
    slow: set[Way] = field(default_factory=set)

    def cut(self, reset: bool) -> None:
        """End it on both sides: by a reset, or as somebody who hangs up."""
        for each in (self.client, self.server):
            with contextlib.suppress(OSError):
                if reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                else:
                    each.shutdown(socket.SHUT_RDWR)
                each.close()


Fault = Callable[[Connection, Way, bytes], bytes]
"""Bytes that would come next, and those that come instead."""


def drop(connection: Connection, way: Way, data: bytes) -> bytes:
    connection.cut(reset=True)
    return b""


def hang_up(connection: Connection, way: Way, data: bytes) -> bytes:
    connection.cut(reset=False)
    return b""


def delay(connection: Connection, way: Way, data: bytes) -> bytes:
    time.sleep(DELAY_SECONDS)
    return data


def duplicate(connection: Connection, way: Way, data: bytes) -> bytes:
    return data[: _some(connection, data)] + data


def reorder(connection: Connection, way: Way, data: bytes) -> bytes:
    half = min(_some(connection, data), len(data) // 2)
    return data[half : 2 * half] + data[:half] + data[2 * half :]


def truncate(connection: Connection, way: Way, data: bytes) -> bytes:
    return data[_some(connection, data) :]


def flip(connection: Connection, way: Way, data: bytes) -> bytes:
    where = connection.rng.randrange(len(data))
    return data[:where] + bytes([data[where] ^ 1 << connection.rng.randrange(8)]) + data[where + 1 :]


def half_open(connection: Connection, way: Way, data: bytes) -> bytes:
    connection.swallow.add(way)
    return b""


def slow_loris(connection: Connection, way: Way, data: bytes) -> bytes:
    connection.slow.add(way)
    return data


def garbage(connection: Connection, way: Way, data: bytes) -> bytes:
    return connection.rng.randbytes(len(data))


FAULTS: dict[str, Fault] = {
    "drop": drop,
    "hang up": hang_up,
    "delay": delay,
    "duplicate": duplicate,
    "reorder": reorder,
    "truncate": truncate,
    "flip": flip,
    "half-open": half_open,
    "slow-loris": slow_loris,
    "garbage": garbage,
}


def _some(connection: Connection, data: bytes) -> int:
    return connection.rng.randint(1, min(len(data), 512))


@dataclass(frozen=True)
class Plan:
    """One fault.

    Parameters
    ----------
    fault : str
        A name in :data:`FAULTS`.
    way : {"up", "down"}
        Edge to cloud, or back.
    at : int
        Bytes of that way that pass unharmed before.
    seed : int
        Of what the fault chooses by itself.
    """

    fault: str
    way: Way
    at: int
    seed: int


class BrokenRelay:
    """On ``127.0.0.1``, to ``target``. The next connection is harmed as :attr:`plan` says; those after it are not."""

    def __init__(self, target: str) -> None:
        self._target = parse_address(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self.plan: Plan | None = None
        self.passed: dict[Way, int] = {"up": 0, "down": 0}
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                plan, self.plan = self.plan, None
                try:
                    server = socket.create_connection(self._target, 5)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.passed = {"up": 0, "down": 0}
                connection = Connection(client, server, random.Random(0 if plan is None else plan.seed))
                ways: tuple[tuple[Way, socket.socket, socket.socket], ...] = (
                    ("up", client, server), ("down", server, client),
                )  # fmt: skip
                for way, source, sink in ways:
                    mine = plan if plan is not None and plan.way == way else None
                    given = (connection, way, source, sink, mine)
                    threading.Thread(target=self._carry, args=given, daemon=True).start()

    def _carry(
        self, connection: Connection, way: Way, source: socket.socket, sink: socket.socket, plan: Plan | None
    ) -> None:
        try:
            while data := source.recv(PIECE):
                before, self.passed[way] = self.passed[way], self.passed[way] + len(data)
                if plan is not None and self.passed[way] > plan.at:
                    cut = max(0, plan.at - before)
                    sink.sendall(data[:cut])
                    data, plan = FAULTS[plan.fault](connection, way, data[cut:]), None
                if way in connection.swallow:
                    continue
                for piece in [data] if way not in connection.slow else [data[i : i + 1] for i in range(len(data))]:
                    sink.sendall(piece)
                    if way in connection.slow:
                        time.sleep(LORIS_SECONDS)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            connection.cut(reset=False)
