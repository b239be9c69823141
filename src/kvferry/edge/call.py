"""The two directions of one call."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future

from kvferry.edge.answer import Answer, CloudSeconds, Seconds
from kvferry.edge.pacing import Meter, Pacer
from kvferry.edge.stream import Cancel
from kvferry.edge.supply import Supply
from kvferry.edge.transfer import Transfer
from kvferry.errors import LinkError
from kvferry.modes import Mode, OnToken, ProtocolError, Sender
from kvferry.pictures.familiar import tell
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import from_wire
from kvferry.wire.sealed import SEAL_BYTES

OnSent = Callable[[int, int | None], None]
PASSAGE_BYTES = 16
AT_ONCE = 1e-3
"""Seconds; 0 would mean that there is no hurry."""


class Crossing:
    """One question under way: a call, or two where the cloud had lost what the first referred to.

    ``bytes_taken`` is what the cloud took in of the last one. Where it is ``patient``, a cloud that has no place is
    asked again when it says so.
    """

    def __init__(
        self,
        sender: Sender,
        max_new_tokens: int,
        on_token: OnToken | None,
        on_sent: OnSent | None,
        began: float,
        seconds: float,
        keep: bool,
        answer_by: float | None = None,
        pacer: Pacer | None = None,
        rtt_seconds: float = 0.0,
        cancel: Cancel | None = None,
    ) -> None:
        self.sender = sender
        self.seconds = seconds
        self.cancel = cancel or Cancel()
        self._max_new_tokens = max_new_tokens
        self._on_token = on_token
        self._on_sent = on_sent
        self._began = began
        self._keep = keep
        self._answer_by = answer_by
        self._pacer = pacer
        self._rtt_seconds = rtt_seconds
        self._calls: list[tuple[Outgoing, Replies]] = []
        self.start = pb.AskRequest.Start()
        self.bytes_taken = 0
        self.patient = True

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.seconds - (time.perf_counter() - self._began)

    @property
    def first_token_at(self) -> float:
        """When the cloud said its first token; 0 if it has not."""
        return max((replies.first_token_at for _, replies in self._calls), default=0.0)

    @property
    def transfers(self) -> list[Transfer]:
        """What each call tells about the link."""
        return [outgoing.transfer for outgoing, _ in self._calls]

    @property
    def sent(self) -> bytes:
        """What the last call sent, where it was to be kept."""
        return bytes(self._calls[-1][0].copy)

    @property
    def said(self) -> tuple[int, ...]:
        """The token ids of the answer."""
        return tuple(self._calls[-1][1].token_ids)

    def begin(self, resumable: bool) -> tuple[Outgoing, Replies]:
        """The two directions of a question that is asked, or asked again: what was said of its answer before is not
        said again, and must not change."""
        self.start = self.sender.start()
        self.start.passage = secrets.token_bytes(PASSAGE_BYTES) if resumable else b""
        self.start.request_id = uuid.uuid4().hex
        self.start.max_new_tokens = self._max_new_tokens
        if self._answer_by is not None:
            self.start.answer_by = max(self._answer_by - (time.perf_counter() - self._began), AT_ONCE)
        outgoing = Outgoing(self.start, self._keep, None if self._pacer is None else self._pacer.meter)
        said = max((replies.token_ids for _, replies in self._calls), key=len, default=[])
        self._calls.append((outgoing, Replies(said)))
        return self._calls[-1]

    @property
    def turns(self) -> int:
        """Of a conversation, that the cloud must read."""
        return len(self.start.conversation.turns)

    def chunks(self) -> Iterator[bytes]:
        """The sender's bytes, when they may leave."""
        chunks = self.sender.chunks()
        return chunks if self._pacer is None else self._pacer.paced(chunks, self._rtt_seconds)

    def follow(self) -> pb.AskReply.Done:
        """The conversation to its end."""
        outgoing, replies = self._calls[-1]
        done = replies.until_done(outgoing, self._on_token, self._on_sent)
        self.bytes_taken = done.bytes_received
        return done

    def answer(self, done: pb.AskReply.Done, mode: Mode) -> Answer:
        """What the question came to."""
        ended = time.perf_counter()
        outgoing, replies = self._calls[-1]
        sender, name_and_options = self.sender, str(mode).partition(":")
        tell(done.note)
        began_sending = outgoing.first_byte_at or replies.received_at
        return Answer(
            text=done.text,
            mode=name_and_options[0],
            recipe=name_and_options[2],
            tokens=done.tokens,
            share=done.share or 1.0,  # an older cloud knows whole caches only
            bitstream_bytes=sum(out.sent_bytes for out, _ in self._calls[:-1])
            + (done.bytes_received if 0 < done.share < 1 else outgoing.sent_bytes),
            bf16_bytes=sender.bf16_bytes,
            kept=sender.kept,
            request_id=self.start.request_id,
            payload_bytes_up=sum(out.message_bytes for out, _ in self._calls),
            payload_bytes_down=sum(back.message_bytes for _, back in self._calls),
            seconds=Seconds(
                prefill=sender.prefill_seconds,
                encode=sender.encode_seconds,
                send=replies.received_at - began_sending,
                first_token=(replies.first_token_at or ended) - self._began,
                total=ended - self._began,
            ),
            cloud=CloudSeconds(
                decode=done.timings.decode,
                queue=done.timings.queue,
                prefill=done.timings.prefill,
                first_token=done.timings.first_token,
                total=done.timings.total,
            ),
        )


class Outgoing:
    """The edge's messages, made in gRPC's sending threads; flow control decides when the next one is made."""

    def __init__(self, start: pb.AskRequest.Start, keep: bool, meter: Meter | None) -> None:
        self.payload: Future[Supply] = Future()
        self.failure: BaseException | None = None
        self.sent_bytes = 0
        self.copy = bytearray()
        self.message_bytes = 0
        self.first_byte_at = 0.0
        self.complete = False
        self.transfer = Transfer()
        self.meter = meter
        self.beat_seconds = 0.0
        self._before = 0
        self._enough = False
        self._start = start
        self._keep = keep
        self._cancel: Callable[[], object] = lambda: None

    def on_failure(self, cancel: Callable[[], object]) -> None:
        """What ends the call when making the bytes fails."""
        self._cancel = cancel

    def send(self, chunks: Iterator[bytes]) -> None:
        """These are the bytes; they are made as they leave."""
        self.payload.set_result(Supply(chunks, self._made))

    def acknowledge(self, total: int) -> None:
        """The cloud has so many of them."""
        self.transfer.acknowledge(max(total - self._before, 0))
        if self.payload.done() and not self.payload.cancelled():
            self.payload.result().acknowledged(total)

    def stop(self) -> None:
        """The cloud has enough."""
        self._enough = True
        self.transfer.cut()

    def __iter__(self) -> Iterator[pb.AskRequest]:
        """The messages of the first call."""
        return self._guarded(self._messages(pb.AskRequest(start=self._start), None))

    def resume(self, seen: int, resumed: Future[pb.AskReply.Resumed]) -> Iterator[pb.AskRequest]:
        """The messages of a further call. What the cloud has of the bytes it says as ``resumed``.

        How fast bytes are acknowledged counts anew from there: what the break took is no property of the link.
        """
        first = pb.AskRequest(resume=pb.AskRequest.Resume(passage=self._start.passage, replies=seen))
        return self._guarded(self._messages(first, resumed))

    def _made(self, data: bytes) -> None:
        self.first_byte_at = self.first_byte_at or time.perf_counter()
        self.sent_bytes += len(data)
        if self._keep:
            self.copy += data

    def _guarded(self, messages: Iterator[pb.AskRequest]) -> Iterator[pb.AskRequest]:
        try:
            for message in messages:
                self.message_bytes += message.ByteSize() + SEAL_BYTES
                yield message
        except CancelledError:
            return
        except Exception as error:
            self.failure = error
            self._cancel()

    def _messages(
        self, first: pb.AskRequest, resumed: Future[pb.AskReply.Resumed] | None
    ) -> Iterator[pb.AskRequest]:
        yield first
        offset = 0
        if resumed is not None:
            there = resumed.result()
            if there.complete:
                return
            offset, self.transfer, self._before = there.bytes, Transfer(), there.bytes
        while not (self.payload.done() or self._waited()):
            yield pb.AskRequest(beat=pb.AskRequest.Beat())
        supply, transfer = self.payload.result(), self.transfer
        while data := supply.read(offset):
            if self._enough:
                return
            chunk = pb.AskRequest.Chunk(data=data, offset=offset)
            offset += len(data)
            transfer.hand_over(offset - self._before)
            yield pb.AskRequest(chunk=chunk)
        self.complete = True
        yield pb.AskRequest(end=pb.AskRequest.End(bytes=offset))

    def _waited(self) -> bool:
        """Wait for the bytes for as long as the cloud may hear nothing; whether they are there."""
        try:
            self.payload.result(self.beat_seconds or None)
        except TimeoutError:
            return False
        return True


class Replies:
    """The cloud's messages, in order, of one call or of several that go on with the same question; an error among them
    is raised.

    Parameters
    ----------
    said : list of int
        Token ids of the same answer that were said before.

    Attributes
    ----------
    beat_seconds : float
        How often the cloud has promised to be heard; 0 where it cannot resume a question.
    seen : int
        Replies that another call need not repeat.
    waiting_since : float
        When the wait for a reply began; 0 while nobody waits for one.
    over : bool
        The last one has come.
    """

    def __init__(self, said: Sequence[int] = ()) -> None:
        self.message_bytes = 0
        self.token_ids: list[int] = []
        self.received_at = 0.0
        self.first_token_at = 0.0
        self.beat_seconds = 0.0
        self.seen = 0
        self.over = False
        self.waiting_since = 0.0
        self._said = tuple(said)
        self._replies: Iterator[pb.AskReply] = iter(())

    def hear(self, call: Iterator[pb.AskReply]) -> None:
        """Go on with the replies of this call."""
        self._replies = self._checked(call)

    def expect_accepted(self, turns: int) -> None:
        """Wait until the cloud agrees to take the bytes, and to read so many turns of a conversation."""
        reply = next(self._replies, None)
        if reply is None or reply.WhichOneof("part") != "accepted":
            raise LinkError("the cloud did not accept the question; update the older end")
        if reply.accepted.turns != turns:
            raise ProtocolError("this cloud knows no conversations; update it, or ask each question alone")
        self.beat_seconds = reply.accepted.beat_seconds

    def expect_resumed(self) -> pb.AskReply.Resumed:
        """Wait until the cloud says what it has."""
        reply = next(self._replies, None)
        if reply is None or reply.WhichOneof("part") != "resumed":
            raise LinkError("the cloud did not resume the question; update the older end")
        return reply.resumed

    def until_done(self, outgoing: Outgoing, on_token: OnToken | None, on_sent: OnSent | None) -> pb.AskReply.Done:
        """Follow the conversation to its end."""
        for reply in self._replies:
            part = reply.WhichOneof("part")
            if part == "received":
                self.received_at = time.perf_counter()
                outgoing.acknowledge(reply.received.bytes)
                if outgoing.meter is not None:
                    outgoing.meter.acknowledge(reply.received.bytes)
                if on_sent is not None:
                    on_sent(reply.received.bytes, outgoing.sent_bytes if outgoing.complete else None)
            elif part == "enough":
                self.received_at = time.perf_counter()
                outgoing.stop()
            elif part == "token":
                self.first_token_at = self.first_token_at or time.perf_counter()
                if self._is_new(reply.token.id) and on_token is not None:
                    on_token(reply.token.id, reply.token.text)
            elif part == "done":
                if len(self.token_ids) < len(self._said):
                    raise _another_answer()
                return reply.done
        raise LinkError("the cloud ended the call without an answer; ask again")

    def _is_new(self, token_id: int) -> bool:
        """Note a token; whether it was not said before."""
        place = len(self.token_ids)
        self.token_ids.append(token_id)
        if place < len(self._said) and self._said[place] != token_id:
            raise _another_answer()
        return place >= len(self._said)

    def _checked(self, call: Iterator[pb.AskReply]) -> Iterator[pb.AskReply]:
        while True:
            self.waiting_since = time.monotonic()
            try:
                reply = next(call, None)
            finally:
                self.waiting_since = 0.0
            if reply is None:
                return
            self.message_bytes += reply.ByteSize() + SEAL_BYTES
            part = reply.WhichOneof("part")
            if part == "beat":
                continue
            self.seen += part not in ("received", "resumed")
            self.over = part in ("done", "error")
            if part == "error":
                raise from_wire(reply.error)
            yield reply


def _another_answer() -> LinkError:
    return LinkError("the cloud lost the answer after its first words, and gives another one now; ask again")
