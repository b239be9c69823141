"""The way to one cloud: a connection, a link that may be emulated, and what is held at the other end."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import grpc

from kvferry.edge.answer import Answer
from kvferry.edge.call import Crossing
from kvferry.edge.membership import Membership
from kvferry.edge.pacing import Pacer
from kvferry.edge.pilot import Pilot
from kvferry.errors import AccessError, DeadlineError, KVFerryError, LinkError
from kvferry.link import Rate, ShapedLink
from kvferry.modes import BusyError, Holdings, Mode, NotHeldError
from kvferry.security import Credentials
from kvferry.telemetry import traces
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc

OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.min_reconnect_backoff_ms", 3_000),  # how long one attempt to connect may take
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # a ping may stand behind a queue of our own bytes
)


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
        self._channel = credentials.channel(cloud, OPTIONS, self._link.address if self._link else None)
        self.stub = service_pb2_grpc.FerryStub(self._channel)
        self._greeted = False

    def close(self) -> None:
        """Leave the coordinator, close the connection, and the emulated link with it."""
        if self.membership is not None:
            self.membership.close()
        self._channel.close()
        if self._link is not None:
            self._link.close()

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
        """One call; a second one with everything in it where the cloud has lost what the first referred to."""
        try:
            done = self._call(crossing)
        except NotHeldError:
            self.holdings.forget()
            done = self._call(crossing)
        if crossing.start.hold:
            self.holdings.learn(done)
        return done

    def _call(self, crossing: Crossing) -> pb.AskReply.Done:
        outgoing = crossing.outgoing()
        if self.pilot is not None:
            crossing.start.expected_bits_per_second = self.pilot.bits_per_second
        metadata = (*self.metadata, *(traces.metadata() or ()))
        call = self.stub.Ask(iter(outgoing), timeout=max(crossing.seconds_left, 0.0), metadata=metadata)
        outgoing.on_failure(call.cancel)
        crossing.cancel.stops(call.cancel)
        replies = crossing.replies(call)
        try:
            if not self._greeted:  # do no work for a cloud that may not be there
                replies.expect_accepted(crossing.turns)
            with traces.span("prepare"):
                crossing.sender.prepare()
            crossing.cancel.check()
            if not self._greeted:
                self._greeted = True
            else:
                replies.expect_accepted(crossing.turns)
            outgoing.payload.set_result(crossing.chunks())
            done = crossing.follow()
            traces.past("send", outgoing.first_byte_at, replies.received_at)
            return done
        except grpc.RpcError as error:
            self._greeted = False
            crossing.cancel.check()
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                outgoing.transfer.cut()
            raise outgoing.failure or self.translated(error, crossing.seconds) from None
        finally:
            outgoing.payload.cancel()
            call.cancel()

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
