"""The way to one cloud: a connection, a link that may be emulated, and what is held at the other end."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from kvferry.edge.answer import Answer
from kvferry.edge.call import Crossing, Outgoing, Replies
from kvferry.edge.membership import Membership
from kvferry.edge.pacing import Pacer
from kvferry.edge.pilot import Pilot
from kvferry.edge.watch import Watch
from kvferry.errors import AccessError, DeadlineError, KVFerryError, LinkError
from kvferry.link import Rate, ShapedLink
from kvferry.modes import BusyError, Holdings, Mode, NotHeldError
from kvferry.security import Credentials
from kvferry.telemetry import traces
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import LostError
from kvferry.wire.sealed import SealedStub

OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, with no back-off from an old one
    ("grpc.min_reconnect_backoff_ms", 3_000),  # how long one attempt to connect may take
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # a ping may stand behind a queue of our own bytes
)
T = TypeVar("T")
RETRY_SECONDS = 0.25
JITTER = 0.5
"""An edge that was told to come again comes up to half as much later, so that not all come at once."""
ASKED_AGAIN = 2
"""A cloud that has lost a question is asked it so many times more."""
LAST_WORDS_SECONDS = 0.5


def broke(error: grpc.RpcError) -> bool:
    """Whether a call ended because its connection did."""
    return error.code() == grpc.StatusCode.UNAVAILABLE


class Line:
    """What all questions of one edge cross. Parameters are those of :class:`kvferry.Edge`.

    Attributes
    ----------
    metadata : tuple
        What is said with every call: the token, if there is one.
    pilot : Pilot or None
        Is told how fast bytes were acknowledged.
    pacer : Pacer or None
        Says when bytes may leave.
    membership : Membership or None
        Its place among those that share the uplink.
    """

    def __init__(
        self,
        cloud: str,
        uplink: str | Rate | None,
        downlink: str | Rate | None,
        delay_ms: float,
        hold: bool,
        credentials: Credentials,
        reconnect_seconds: float,
    ) -> None:
        credentials.check_for(cloud)
        self.pilot: Pilot | None = None
        self.pacer: Pacer | None = None
        self.membership: Membership | None = None
        self.holdings = Holdings(hold)
        self._cloud = cloud
        self._link: ShapedLink | None = None
        if uplink is not None or downlink is not None or delay_ms:
            self._link = ShapedLink(cloud, uplink, downlink, delay_ms)
        self.metadata = credentials.metadata()
        self._credentials, self._reconnect_seconds = credentials, reconnect_seconds
        self._channel = credentials.channel(cloud, OPTIONS, self._link.address if self._link else None)
        self._stub = SealedStub(self._channel)
        self._greeted = self._broken = False
        self._beat_seconds = 0.0
        self._last_words: Any = None

    def close(self) -> None:
        """Leave the coordinator, close the connection, and the emulated link with it."""
        if self.membership is not None:
            self.membership.close()
        if self._last_words is not None:
            with suppress(grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                self._last_words.result(LAST_WORDS_SECONDS)
        self._channel.close()
        if self._link is not None:
            self._link.close()

    @property
    def stub(self) -> Any:
        """The cloud's methods. Where the connection broke before, on a new one: gRPC would wait before it tried."""
        if self._broken:
            self._connect()
        return self._stub

    @property
    def carried(self) -> tuple[int, int] | None:
        """What the emulated link has carried so far, up and down."""
        return (self._link.uplink_bytes, self._link.downlink_bytes) if self._link else None

    @property
    def rtt_seconds(self) -> float:
        """Round trip as far as it is known, else 0."""
        return 0.0 if self.pilot is None else self.pilot.rtt_seconds

    def asking(self) -> AbstractContextManager[None]:
        """While a question is under way."""
        return nullcontext() if self.membership is None else self.membership.asking()

    def cross(self, crossing: Crossing, mode: Mode, before: tuple[int, int] | None) -> Answer:
        """What a question comes to in the cloud; ``before`` is what the link had carried when it was asked."""
        with traces.span("ask", "client") as around:
            around.note({"mode": mode.NAME})
            try:
                answer = crossing.answer(self._done(crossing), mode)
            finally:
                self._learn(crossing)
                around.note({"request_id": crossing.start.request_id})
            around.note({"bytes": answer.bitstream_bytes, "tokens": answer.tokens})
        after = self.carried
        if after is None or before is None:
            return answer
        return replace(answer, wire_bytes_up=after[0] - before[0], wire_bytes_down=after[1] - before[1])

    def _done(self, crossing: Crossing) -> pb.AskReply.Done:
        """What the cloud answers; asked again, with everything in it, where the cloud has lost what it was told."""
        for left in reversed(range(ASKED_AGAIN + 1)):
            try:
                done = self._admitted(crossing)
                break
            except (NotHeldError, LostError):
                if not left:
                    raise
                self.holdings.forget()
        if crossing.start.hold:
            self.holdings.learn(done)
        return done

    def _admitted(self, crossing: Crossing) -> pb.AskReply.Done:
        """Calls until the cloud has a place; each when it said, as long as there is time and nobody else to answer."""
        while True:
            try:
                return self._call(crossing)
            except BusyError as busy:
                wait = busy.retry_seconds * (1 + JITTER * random.random())
                if not (crossing.patient and 0 < wait < crossing.seconds_left):
                    raise
            crossing.cancel.wait(wait)

    def _call(self, crossing: Crossing) -> pb.AskReply.Done:
        """One call, and others that go on where it breaks."""
        outgoing, replies = crossing.begin(self._reconnect_seconds > 0)
        if self.pilot is not None:
            crossing.start.expected_bits_per_second = self.pilot.bits_per_second
        outgoing.beat_seconds = replies.beat_seconds = self._beat_seconds
        watch = Watch(replies)
        try:
            self._dial(crossing, iter(outgoing), outgoing, replies, watch)
            if not self._greeted:  # do no work for a cloud that may not be there
                replies.expect_accepted(crossing.turns)
                outgoing.beat_seconds = self._beat_seconds = replies.beat_seconds
            with traces.span("prepare"):
                crossing.sender.prepare()
            crossing.cancel.check()
            if self._greeted:
                self._steadily(lambda: replies.expect_accepted(crossing.turns), crossing, outgoing, replies, watch)
            self._greeted = True
            outgoing.send(crossing.chunks())
            done = self._steadily(crossing.follow, crossing, outgoing, replies, watch)
            traces.past("send", outgoing.first_byte_at, replies.received_at)
            return done
        except grpc.RpcError as error:
            self._greeted = False
            crossing.cancel.check()
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                outgoing.transfer.cut()
            raise outgoing.failure or self._silence(watch) or self.translated(error, crossing.seconds) from None
        finally:
            outgoing.payload.cancel()
            watch.close()
            if replies.beat_seconds and not replies.over:
                self._abandon(crossing.start.passage)

    def _dial(
        self, crossing: Crossing, messages: Iterator[pb.AskRequest], outgoing: Outgoing, replies: Replies, watch: Watch
    ) -> None:
        metadata = (*self.metadata, *(traces.metadata() or ()))
        call = self.stub.Ask(messages, timeout=max(crossing.seconds_left, 0.0), metadata=metadata)
        outgoing.on_failure(call.cancel)
        crossing.cancel.stops(call.cancel)
        replies.hear(call)
        watch.over(call.cancel)

    def _steadily(
        self, work: Callable[[], T], crossing: Crossing, outgoing: Outgoing, replies: Replies, watch: Watch
    ) -> T:
        """Do it, over as many connections as it takes."""
        while True:
            try:
                return work()
            except grpc.RpcError as error:
                self._resume(crossing, outgoing, replies, watch, error)

    def _resume(
        self, crossing: Crossing, outgoing: Outgoing, replies: Replies, watch: Watch, error: grpc.RpcError
    ) -> None:
        """Go on with the question on another connection; raises ``error`` where that cannot be done in time."""
        if not self._reconnect_seconds:
            raise error
        until = time.monotonic() + min(self._reconnect_seconds, crossing.seconds_left)
        while replies.beat_seconds and outgoing.failure is None and (watch.silent or broke(error)):
            crossing.cancel.check()
            self._connect()
            resumed: Future[pb.AskReply.Resumed] = Future()
            try:
                messages = outgoing.resume(replies.seen, resumed)
                self._dial(crossing, messages, outgoing, replies, watch)
                resumed.set_result(replies.expect_resumed())
                return
            except grpc.RpcError as again:
                resumed.cancel()
                if not (watch.silent or broke(again)):
                    raise
            except BaseException:
                resumed.cancel()
                raise
            if time.monotonic() + RETRY_SECONDS > until:
                break
            time.sleep(RETRY_SECONDS)
        raise error

    def _connect(self) -> None:
        """A new connection, which begins at once whatever became of those before."""
        self._channel.close()
        through = self._link.address if self._link else None
        self._channel = self._credentials.channel(self._cloud, OPTIONS, through)
        self._stub = SealedStub(self._channel)
        self._broken = False

    def _abandon(self, passage: bytes) -> None:
        """Tell the cloud that nobody wants that answer any more, if it can be told soon."""
        request = pb.AbandonRequest(passage=passage)
        with suppress(ValueError):  # closed meanwhile
            self._last_words = self.stub.Abandon.future(request, timeout=1.0, metadata=self.metadata)

    def _silence(self, watch: Watch) -> LinkError | None:
        if not watch.silent:
            return None
        return LinkError(f"nothing was heard of the cloud at {self._cloud} for {watch.seconds:g} s; see that it runs")

    def _learn(self, crossing: Crossing) -> None:
        """Tell the pilot what was acknowledged how fast."""
        if self.pacer is not None:
            self.pacer.meter.end()
        if self.pilot is not None:
            for transfer in crossing.transfers:
                if (measured := transfer.measured(self.pilot.rtt_seconds)) is not None:
                    self.pilot.learn(*measured)

    def translated(self, error: grpc.RpcError, seconds: float) -> KVFerryError:
        """What gRPC reports, in our words."""
        code, details = error.code(), error.details() or "no details"
        self._broken = self._broken or broke(error)
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"no answer within {seconds:g} s; allow more time, or send less (a smaller recipe)")
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return BusyError(f"the cloud at {self._cloud} takes no more calls now ({details}); try again in a while")
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return AccessError(f"the cloud at {self._cloud} refuses: {details}")
        if code == grpc.StatusCode.UNAVAILABLE and "handshake" in details.lower():
            return LinkError(
                f"no TLS with the cloud at {self._cloud} ({details}); see that --ca is its CA, that its certificate "
                "names this host and has not expired, and that it believes --cert"
            )
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return LinkError(f"what answers at {self._cloud} is no kvferry cloud, or an older one; check the address")
        if code == grpc.StatusCode.UNAVAILABLE:
            return LinkError(
                f"the cloud at {self._cloud} cannot be reached or went away ({details}); "
                "see that `kvferry serve` runs there"
            )
        return LinkError(f"the call to {self._cloud} failed ({code.name}: {details}); try again")
