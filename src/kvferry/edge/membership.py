"""One edge's place among those that share an uplink."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from kvferry.edge.pacing import Meter
from kvferry.errors import AccessError, InputError, KVFerryError
from kvferry.policy import Context, OperatingPoint
from kvferry.security import Credentials
from kvferry.wire import coordinate_pb2 as pb
from kvferry.wire import coordinate_pb2_grpc
from kvferry.wire.faults import from_wire

OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
RETRY_SECONDS = 0.5
BEATS = 3
"""Reports in a lease."""
NOTABLE = 0.1
"""A question's time that differs by a smaller part from the one before is not worth a message."""
WAKE_SECONDS = 0.5
"""How long a choice waits for a share that a rest took away; bytes that may leave already do not."""
FIRST_BEAT = 0.5
"""Seconds between them before the lease's length is known."""


@dataclass(frozen=True)
class Share:
    """What the coordinator grants.

    Parameters
    ----------
    bits_per_second : float
        0 where there is no room for this edge.
    mode : str
        What it counts on; empty where no point fits.
    members : int
        Who share the link.
    version : int
    resting : bool
        Nothing was asked for a while, so that this is only what a fallback takes.
    """

    bits_per_second: float
    mode: str
    members: int
    version: int
    resting: bool = False


class Membership:
    """Joins in a thread of its own, keeps its lease, and joins again where the coordinator was away.

    Parameters
    ----------
    coordinator : str
        ``host:port`` of ``kvferry coordinate``.
    points : sequence of OperatingPoint
        What may be sent.
    deadline : float
        Seconds a question may take.
    meter : Meter
        Where the reports come from.
    name : str
        For the coordinator's log.
    credentials : Credentials
    """

    def __init__(
        self,
        coordinator: str,
        points: Sequence[OperatingPoint],
        deadline: float,
        meter: Meter,
        name: str = "",
        credentials: Credentials = Credentials(),  # noqa: B008 - frozen
    ) -> None:
        plain = Context(deadline)
        self._points = [
            pb.AgentMessage.Point(mode=x.mode, quality=x.quality, bytes=x.nbytes, seconds=plain.fixed_seconds(x))
            for x in points
        ]
        self._name, self._deadline = name, deadline
        self._again: queue.SimpleQueue[pb.AgentMessage | None] = queue.SimpleQueue()
        self._questions = 0
        self._coordinator = coordinator
        self._meter = meter
        self._news = threading.Condition()
        self._share: Share | None = None
        self._until = 0.0
        self._beat = FIRST_BEAT
        self._refusal: KVFerryError | None = None
        self._closing = threading.Event()
        self.why_alone = ""
        self._metadata = credentials.metadata()
        self._channel = credentials.channel(coordinator, OPTIONS)
        self._stub = coordinate_pb2_grpc.CoordinatorStub(self._channel)
        self._thread = threading.Thread(target=self._stay, name="kvferry-membership", daemon=True)
        self._thread.start()

    def share(self, wait_seconds: float = 0.0) -> Share | None:
        """The share that holds now; None where the coordinator is away.

        Parameters
        ----------
        wait_seconds : float
            How long to wait where nothing has been heard of the coordinator yet; half a second of that also where this
            edge rested, and has just said that it asks.

        Raises
        ------
        InputError, AccessError
            The coordinator will not have this edge; the message says why.
        """
        with self._news:
            self._news.wait_for(lambda: self._share or self.why_alone or self._refusal, wait_seconds)
            self._news.wait_for(lambda: not (self._share and self._share.resting), min(wait_seconds, WAKE_SECONDS))
            if self._refusal is not None:
                raise self._refusal
            if self._share is None or time.monotonic() > self._until:
                return None
            return self._share

    def plan(self, seconds: float) -> None:
        """Tell the coordinator that a question has so long for a point's own seconds and its transfer."""
        if abs(seconds - self._deadline) > NOTABLE * self._deadline:
            self._deadline = seconds
            self._again.put(self._join())

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While a question is under way: the coordinator is told at once, and until it ends."""
        with self._news:
            self._questions += 1
            self._again.put(None)
        try:
            yield
        finally:
            with self._news:
                self._questions -= 1

    @property
    def bits_per_second(self) -> float | None:
        """Of the share that holds now, for a pacer."""
        share = self._share
        return None if share is None or time.monotonic() > self._until else share.bits_per_second

    def close(self) -> None:
        """Leave."""
        self._closing.set()
        self._channel.close()
        self._thread.join()

    def _stay(self) -> None:
        while not self._closing.is_set():
            try:
                self._belong()
                why = "it ended the call"
            except InputError as error:
                with self._news:
                    self._refusal = error
                    self._news.notify_all()
                return
            except KVFerryError as error:
                why = str(error)
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                    with self._news:
                        self._refusal = AccessError(f"the coordinator refuses: {error.details()}")
                        self._news.notify_all()
                    return
                why = f"{error.code().name}: {error.details() or 'no details'}"
            except ValueError:  # the channel was closed before the call began
                return
            with self._news:
                self._share, self.why_alone = None, f"the coordinator at {self._coordinator} is away ({why})"
                self._news.notify_all()
            self._closing.wait(RETRY_SECONDS)

    def _belong(self) -> None:
        over = threading.Event()
        self._again = queue.SimpleQueue()  # what the old one holds is news to nobody: a join tells it all
        call = self._stub.Share(self._messages(over, self._again), metadata=self._metadata)
        try:
            for reply in call:
                if reply.WhichOneof("part") == "error":
                    raise from_wire(reply.error)
                share = reply.share
                with self._news:
                    self._share = Share(share.bits_per_second, share.mode, share.members, share.version, share.resting)
                    self._until = time.monotonic() + share.lease_seconds
                    self._beat = share.lease_seconds / BEATS
                    self.why_alone = ""
                    self._news.notify_all()
        finally:
            over.set()
            call.cancel()

    def _messages(
        self, over: threading.Event, again: queue.SimpleQueue[pb.AgentMessage | None]
    ) -> Iterator[pb.AgentMessage]:
        yield self._join()
        if self._questions:
            yield self._report()
        while not over.is_set():
            try:
                message = again.get(timeout=self._beat)
            except queue.Empty:
                message = None
            yield message or self._report()

    def _report(self) -> pb.AgentMessage:
        nbytes, seconds, slow = self._meter.take()
        asking = self._questions > 0
        return pb.AgentMessage(report=pb.AgentMessage.Report(bytes=nbytes, seconds=seconds, slow=slow, asking=asking))

    def _join(self) -> pb.AgentMessage:
        return pb.AgentMessage(join=pb.AgentMessage.Join(name=self._name, points=self._points, deadline=self._deadline))
