"""What a mode is: an edge's half that makes bytes and a cloud's half that turns them into an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.models import Continuation
    from kvferry.summary import Summary

CHUNK_BYTES = 64 * 1024
"""Largest piece that is sent at once: 52 ms at 10 Mbit/s."""

OnToken = Callable[[int, str], None]


class Sender(Protocol):
    """The edge's half, made for one question."""

    bf16_bytes: int | None
    """What the uncompressed cache (every prompt token, BF16) would take, where a cache is sent."""
    kept: Summary | None
    """What the compressed cache holds, once it has been selected."""
    prefill_seconds: float
    encode_seconds: float

    def start(self) -> pb.AskRequest.Start:
        """What the cloud must know before the first byte. Raises InputError for what can be seen to be wrong."""

    def prepare(self) -> None:
        """The work before the first byte; runs while the cloud looks at the start."""

    def chunks(self) -> Iterator[bytes]:
        """The bytes, at most ``CHUNK_BYTES`` at a time, made as they are asked for."""


class Receiver(Protocol):
    """The cloud's half, made for one request from its start. Its methods run in worker threads, one at a time."""

    prefill_seconds: float

    def feed(self, data: bytes) -> None:
        """Take in the next bytes. Raises a KVFerryError as soon as they can be seen to be wrong."""

    def finish(self) -> None:
        """Everything has arrived. Raises TruncatedError if it has not."""

    def answer(self, max_new_tokens: int, on_token: OnToken) -> Continuation:
        """Run the model. What ``on_token`` raises ends it."""


def cut(pieces: Iterable[bytes], limit: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The same bytes in pieces of at most ``limit``; small pieces are left as they are, so that none waits."""
    for piece in pieces:
        for begin in range(0, len(piece), limit):
            yield piece[begin : begin + limit]
