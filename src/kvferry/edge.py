"""The edge's end: asks a cloud a question about pictures, over a link that may be slow."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import grpc

from kvferry.errors import DeadlineError, InputError, KVFerryError, LinkError
from kvferry.link import Rate, ShapedLink, parse_address
from kvferry.modes import ImageSender, KVSender, OnToken, Sender
from kvferry.modes.faults import BusyError, from_wire
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc

if TYPE_CHECKING:
    from kvferry.models import VLM
    from kvferry.recipe import Recipe
    from kvferry.summary import Summary

DEFAULT_RECIPE = "q2c@0.25|int4"
OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.min_reconnect_backoff_ms", 3_000),  # how long one attempt to connect may take
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # a ping may stand behind a queue of our own bytes
)
OnSent = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Seconds:
    """Where an answer's time went, by the edge's clock.

    ``send`` runs from the first payload byte to the cloud's acknowledgement of the last, encoding included where
    it overlaps; ``first_token`` and ``total`` run from the call of :meth:`Edge.ask`.
    """

    prefill: float
    encode: float
    send: float
    first_token: float
    total: float


@dataclass(frozen=True)
class CloudSeconds:
    """The same by the cloud's clock: ``first_token`` from the last byte's arrival, ``total`` from the first's."""

    decode: float
    queue: float
    prefill: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Answer:
    """What the cloud said and what it cost.

    Parameters
    ----------
    recipe : str
        Canonical, or empty in mode ``image``.
    bitstream_bytes : int
        The bitstream; in mode ``image`` the picture files.
    bf16_bytes : int or None
        The uncompressed cache (BF16, every prompt token), where a cache was sent.
    kept : Summary or None
        What was kept where, of a cache that was sent.
    payload_bytes_up, payload_bytes_down : int
        gRPC messages, without gRPC's and HTTP/2's own framing.
    wire_bytes_up, wire_bytes_down : int or None
        Every byte on the connection, counted by the link; None where no link is emulated. The first question of an
        :class:`Edge` includes setting up the connection.
    """

    text: str
    mode: str
    recipe: str
    tokens: int
    bitstream_bytes: int
    bf16_bytes: int | None
    kept: Summary | None
    payload_bytes_up: int
    payload_bytes_down: int
    wire_bytes_up: int | None
    wire_bytes_down: int | None
    seconds: Seconds
    cloud: CloudSeconds

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)


class Edge:
    """A device that holds a model and asks a cloud, one question at a time.

    Parameters
    ----------
    vlm : VLM or None
        The cloud's own model, as :func:`kvferry.load` gives it. Mode ``image`` needs none.
    cloud : str
        ``host:port`` of a running ``kvferry serve``.
    uplink, downlink : str, Rate or None
        Emulate a link of this rate; None leaves the real one alone.
    delay_ms : float
        One-way delay of the emulated link, in milliseconds.
    deadline : float
        Seconds a question may take, all included.

    Examples
    --------
    >>> with Edge(kvferry.load("testbed/cloud"), uplink="10mbit") as edge:  # doctest: +SKIP
    ...     print(edge.ask(["scene.png"], "what colour is the circle?").text)
    """

    def __init__(
        self,
        vlm: VLM | None,
        cloud: str = "127.0.0.1:7421",
        *,
        uplink: str | Rate | None = None,
        downlink: str | Rate | None = None,
        delay_ms: float = 0.0,
        deadline: float = 30.0,
    ) -> None:
        parse_address(cloud)
        self._vlm = vlm
        self._cloud = cloud
        self._deadline = _checked_deadline(deadline)
        self._link: ShapedLink | None = None
        if uplink is not None or downlink is not None or delay_ms:
            self._link = ShapedLink(cloud, uplink, downlink, delay_ms)
        self._channel = grpc.insecure_channel(self._link.address if self._link else cloud, options=OPTIONS)
        self._stub = service_pb2_grpc.FerryStub(self._channel)
        self._greeted = False

    def close(self) -> None:
        """Close the connection, and the emulated link with it."""
        self._channel.close()
        if self._link is not None:
            self._link.close()

    def __enter__(self) -> Edge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """What the cloud serves: its model's name and fingerprint, modes and limits."""
        try:
            reply = self._stub.Describe(pb.DescribeRequest(), timeout=self._deadline)
        except grpc.RpcError as error:
            raise self._translated(error, self._deadline) from None
        names = {pb.MODE_KV: "kv", pb.MODE_IMAGE: "image"}
        return {
            "kvferry_version": reply.kvferry_version,
            "model": reply.model,
            "fingerprint": reply.fingerprint,
            "has_vision": reply.has_vision,
            "modes": [names[mode] for mode in reply.modes if mode in names],
            "max_request_bytes": reply.max_request_bytes,
            "max_request_seconds": reply.max_request_seconds,
        }

    def ask(
        self,
        images: Sequence[Any] | Any,
        question: str,
        *,
        recipe: str | Recipe = DEFAULT_RECIPE,
        mode: Literal["kv", "image"] = "kv",
        ship_first: bool = False,
        tiers: int = 1,
        max_new_tokens: int = 16,
        deadline: float | None = None,
        on_token: OnToken | None = None,
        on_sent: OnSent | None = None,
        keep: BinaryIO | None = None,
    ) -> Answer:
        """Ask one question.

        Parameters
        ----------
        images : path, PIL image or array, or a list of them
            May be empty. Mode ``image`` takes no arrays.
        ship_first : bool
            Protocol B: compress the scene without looking at the question, and ask it in the cloud.
        tiers : int
            In how many parts a cache travels, the most important tokens first; see :func:`kvferry.compress`.
        deadline : float, optional
            Instead of the edge's own.
        on_token : callable, optional
            ``(token_id, text)`` of every token as it comes.
        on_sent : callable, optional
            ``(acknowledged, total)`` bytes as the cloud confirms them; the total is None while it is encoded.
        keep : binary file, optional
            Gets a copy of the sent bytes: a bitstream that ``kvferry inspect`` reads.

        Raises
        ------
        InputError, RecipeError, FingerprintError, BitstreamError
            This question cannot be answered; found here or by the cloud.
        LinkError, DeadlineError
            The cloud is away, went away, is too busy, or was too slow.
        """
        began = time.perf_counter()
        seconds = self._deadline if deadline is None else _checked_deadline(deadline)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is at least 1, not {max_new_tokens}")
        pictures = images if isinstance(images, list | tuple) else [images]
        sender = self._sender(pictures, question, recipe, mode, ship_first, tiers)
        start = sender.start()
        start.request_id = uuid.uuid4().hex
        start.max_new_tokens = max_new_tokens
        before = (self._link.uplink_bytes, self._link.downlink_bytes) if self._link else None

        outgoing = _Outgoing(start, keep)
        call = self._stub.Ask(iter(outgoing), timeout=seconds - (time.perf_counter() - began))
        outgoing.on_failure(call.cancel)
        replies = _Replies(call)
        try:
            if not self._greeted:  # do no work for a cloud that may not be there
                replies.expect_accepted()
            sender.prepare()
            if not self._greeted:
                self._greeted = True
            else:
                replies.expect_accepted()
            outgoing.payload.set_result(sender.chunks())
            done = replies.until_done(outgoing, on_token, on_sent)
        except grpc.RpcError as error:
            self._greeted = False
            raise outgoing.failure or self._translated(error, seconds) from None
        finally:
            outgoing.payload.cancel()
            call.cancel()
        ended = time.perf_counter()
        return Answer(
            text=done.text,
            mode=mode,
            recipe=start.recipe,
            tokens=done.tokens,
            bitstream_bytes=outgoing.sent_bytes,
            bf16_bytes=sender.bf16_bytes,
            kept=sender.kept,
            payload_bytes_up=outgoing.message_bytes,
            payload_bytes_down=replies.message_bytes,
            wire_bytes_up=self._link.uplink_bytes - before[0] if self._link and before else None,
            wire_bytes_down=self._link.downlink_bytes - before[1] if self._link and before else None,
            seconds=Seconds(
                prefill=sender.prefill_seconds,
                encode=sender.encode_seconds,
                send=replies.received_at - outgoing.first_byte_at,
                first_token=(replies.first_token_at or ended) - began,
                total=ended - began,
            ),
            cloud=CloudSeconds(
                decode=done.timings.decode,
                queue=done.timings.queue,
                prefill=done.timings.prefill,
                first_token=done.timings.first_token,
                total=done.timings.total,
            ),
        )

    def _sender(
        self, images: Sequence[Any], question: str, recipe: str | Recipe, mode: str, ship_first: bool, tiers: int
    ) -> Sender:
        if mode == "image":
            return ImageSender(images, question)
        if mode != "kv":
            raise InputError(f"there is no mode {mode!r}; use kv or image")
        if self._vlm is None:
            raise InputError("mode kv needs the cloud's model on this side too; load it, or use mode image")
        return KVSender(self._vlm, images, question, recipe, ship_first, tiers)

    def _translated(self, error: grpc.RpcError, seconds: float) -> KVFerryError:
        """What gRPC reports, in our words."""
        code, details = error.code(), error.details() or "no details"
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"no answer within {seconds:g} s; allow more time, or send less (a smaller recipe)")
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return BusyError(f"the cloud at {self._cloud} takes no more calls now ({details}); try again in a while")
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return LinkError(f"what answers at {self._cloud} is no kvferry cloud, or an older one; check the address")
        if code == grpc.StatusCode.UNAVAILABLE:
            return LinkError(
                f"the cloud at {self._cloud} cannot be reached or went away ({details}); "
                "see that `kvferry serve` runs there"
            )
        return LinkError(f"the call to {self._cloud} failed ({code.name}: {details}); try again")


class _Outgoing:
    """The edge's messages, made in gRPC's sending thread; flow control decides when the next one is made."""

    def __init__(self, start: pb.AskRequest.Start, keep: BinaryIO | None) -> None:
        self.payload: Future[Iterator[bytes]] = Future()
        self.failure: BaseException | None = None
        self.sent_bytes = 0
        self.message_bytes = 0
        self.first_byte_at = 0.0
        self.complete = False
        self._start = start
        self._keep = keep
        self._cancel: Callable[[], object] = lambda: None

    def on_failure(self, cancel: Callable[[], object]) -> None:
        """What ends the call when making the bytes fails."""
        self._cancel = cancel

    def __iter__(self) -> Iterator[pb.AskRequest]:
        try:
            for message in self._messages():
                self.message_bytes += message.ByteSize()
                yield message
        except CancelledError:
            return
        except Exception as error:
            self.failure = error
            self._cancel()

    def _messages(self) -> Iterator[pb.AskRequest]:
        yield pb.AskRequest(start=self._start)
        for data in self.payload.result():
            self.first_byte_at = self.first_byte_at or time.perf_counter()
            self.sent_bytes += len(data)
            if self._keep is not None:
                self._keep.write(data)
            yield pb.AskRequest(chunk=pb.AskRequest.Chunk(data=data))
        self.complete = True
        yield pb.AskRequest(end=pb.AskRequest.End(bytes=self.sent_bytes))


class _Replies:
    """The cloud's messages, in order; an error among them is raised."""

    def __init__(self, call: Iterator[pb.AskReply]) -> None:
        self.message_bytes = 0
        self.received_at = 0.0
        self.first_token_at = 0.0
        self._replies = self._checked(call)

    def expect_accepted(self) -> None:
        """Wait until the cloud agrees to take the bytes."""
        if next(self._replies).WhichOneof("part") != "accepted":
            raise LinkError("the cloud did not accept the question; update the older end")

    def until_done(self, outgoing: _Outgoing, on_token: OnToken | None, on_sent: OnSent | None) -> pb.AskReply.Done:
        """Follow the conversation to its end."""
        done: pb.AskReply.Done | None = None
        for reply in self._replies:
            part = reply.WhichOneof("part")
            if part == "received":
                self.received_at = time.perf_counter()
                if on_sent is not None:
                    on_sent(reply.received.bytes, outgoing.sent_bytes if outgoing.complete else None)
            elif part == "token":
                self.first_token_at = self.first_token_at or time.perf_counter()
                if on_token is not None:
                    on_token(reply.token.id, reply.token.text)
            elif part == "done":
                done = reply.done
        if done is None:
            raise LinkError("the cloud ended the call without an answer; ask again")
        return done

    def _checked(self, call: Iterator[pb.AskReply]) -> Iterator[pb.AskReply]:
        for reply in call:
            self.message_bytes += reply.ByteSize()
            if reply.WhichOneof("part") == "error":
                raise from_wire(reply.error)
            yield reply


def _checked_deadline(seconds: float) -> float:
    if not 0 < seconds <= 86_400:
        raise InputError(f"a deadline is a positive number of seconds, at most a day, not {seconds}")
    return seconds
