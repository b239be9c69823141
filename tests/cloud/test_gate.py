"""Silent calls, quotas, and questions that outlive their call, on real sockets."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvferry import VLM, AccessError, Edge
from kvferry.cloud import Limits
from kvferry.cloud.admission import Quota
from kvferry.modes.digests import file_digest
from kvferry.pictures import identify
from kvferry.security import Credentials
from kvferry.security.tokens import new_token
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from kvferry.wire.faults import BusyError, QuotaError
from tests.crossing.test_limits import served

QUESTION = "what colour is the circle?"


NAME = bytes(range(16))


class Call:
    """A call that says what it is told to, when it is told to."""

    def __init__(self, stub: Any, *messages: pb.AskRequest, token: str = "", seconds: float = 60.0) -> None:
        self._gone, self._messages = threading.Event(), list(messages)
        self._more = threading.Condition()
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.replies = stub.Ask(self._said(), timeout=seconds, metadata=metadata)

    def say(self, *messages: pb.AskRequest) -> None:
        with self._more:
            self._messages += messages
            self._more.notify()

    def _said(self) -> Iterator[pb.AskRequest]:
        while not self._gone.is_set():
            with self._more:
                self._more.wait_for(lambda: self._messages or self._gone.is_set(), 30)
                message = self._messages.pop(0) if self._messages else None
            if message is not None:
                yield message

    def until(self, part: str) -> list[pb.AskReply]:
        """Replies up to the first of that kind."""
        replies: list[pb.AskReply] = []
        for reply in self.replies:
            replies.append(reply)
            if reply.WhichOneof("part") == part:
                break
        return replies

    def rest(self) -> list[pb.AskReply]:
        return list(self.replies)

    def cut(self) -> None:
        self._gone.set()
        self.replies.cancel()


@contextmanager
def stub_of(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.FerryStub(channel)


def start_of(data: bytes, **more: Any) -> pb.AskRequest:
    items = [pb.AskRequest.Item(digest=file_digest(data, identify(data)), size=len(data))]
    start = pb.AskRequest.Start(mode=pb.MODE_IMAGE, question=QUESTION, max_new_tokens=8, items=items, **more)
    return pb.AskRequest(start=start)


def chunk(data: bytes, offset: int | None = None) -> pb.AskRequest:
    return pb.AskRequest(chunk=pb.AskRequest.Chunk(data=data, offset=offset))


def end(nbytes: int) -> pb.AskRequest:
    return pb.AskRequest(end=pb.AskRequest.End(bytes=nbytes))


def resume(passage: bytes, seen: int) -> pb.AskRequest:
    return pb.AskRequest(resume=pb.AskRequest.Resume(passage=passage, replies=seen))


def parts(replies: list[pb.AskReply]) -> list[str | None]:
    return [reply.WhichOneof("part") for reply in replies]


def test_calls_that_say_nothing_refuse_nobody(vlm: VLM) -> None:
    """70 that have not even begun, on 8 places: each is told so after a while, and others are served meanwhile."""
    with served(vlm, Limits(calls=8, start_seconds=4.0)) as address, stub_of(address) as stub:
        silent = [Call(stub) for _ in range(70)]
        with Edge(None, address) as edge:
            assert edge.ask([], QUESTION, mode="prompt").tokens == 16
            edge.describe()
        for call in silent:
            (reply,) = call.rest()
            assert reply.error.kind == pb.ERROR_KIND_PROTOCOL
            assert "within 4 s" in reply.error.message


def test_calls_that_begin_and_then_say_nothing_make_room(vlm: VLM, picture: Path) -> None:
    """They keep their places while nobody needs them, and are ended when they have been idle for too long."""
    data, limits = picture.read_bytes(), Limits(calls=3, idle_seconds=8.0)
    with served(vlm, limits) as address, ExitStack() as stack:
        silent = [Call(stack.enter_context(stub_of(address)), start_of(data)) for _ in range(3)]
        for call in silent:
            assert parts(call.until("accepted")) == ["accepted"]
        with Edge(None, address) as edge:
            (reply,) = Call(stack.enter_context(stub_of(address)), start_of(data)).rest()
            assert reply.error.kind == pb.ERROR_KIND_BUSY
            assert "3 questions are open" in reply.error.message
            assert reply.error.retry_seconds > 0
            time.sleep(1.1)
            assert edge.ask([], QUESTION, mode="prompt").tokens == 16
        last = [call.rest()[-1].error for call in silent]
    assert sorted(error.kind for error in last) == [pb.ERROR_KIND_BUSY, *2 * [pb.ERROR_KIND_DEADLINE]]
    assert any("nothing came from the edge for 8 s" in error.message for error in last)


def test_a_quota_fills_up_again() -> None:
    now = [0.0]
    quota = Quota(600.0, lambda: now[0])
    quota.take(599.0)
    assert quota.wait_seconds == 0
    quota.take(11.0)
    assert quota.wait_seconds == pytest.approx(1.0)
    now[0] = 0.9
    assert quota.wait_seconds == pytest.approx(0.1)
    now[0] = 1000.0
    quota.take(1.0)
    assert quota.wait_seconds == 0


def test_what_a_token_may_use_up(vlm: VLM, picture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And no token is in the log, whatever becomes of its question."""
    caplog.set_level(logging.DEBUG)
    file, data = tmp_path / "tokens.toml", picture.read_bytes()
    one = new_token(file, "one", calls=1)
    few = new_token(file, "few", bytes_per_minute=len(data) - 1)
    short = new_token(file, "short", model_seconds_per_minute=0.001)
    free = new_token(file, "free")

    def ask(token: str) -> None:
        with Edge(None, address, credentials=Credentials(token=token)) as edge:
            edge.ask([picture], QUESTION, mode="image", max_new_tokens=1)

    with served(vlm, Limits(), file) as address, stub_of(address) as stub:
        held = Call(stub, start_of(data), token=one)
        held.until("accepted")
        with pytest.raises(BusyError, match="1 questions of this edge are open"):
            ask(one)
        held.cut()
        until(lambda: ask(one))
        with pytest.raises(QuotaError, match=r"few may have .* bytes a minute; ask again in"):
            ask(few)
        ask(short)
        with pytest.raises(QuotaError, match=r"short may have 0\.001 model seconds a minute"):
            ask(short)
        ask(free)
        with pytest.raises(AccessError):
            ask("kvf_wrong")
    assert "few" in caplog.text
    assert not [token for token in (one, few, short, free, "kvf_wrong") if token in caplog.text]


def until(works: Callable[[], object]) -> None:
    for _ in range(50):
        try:
            works()
            return
        except BusyError:
            time.sleep(0.05)
    works()


def test_another_call_takes_over(vlm: VLM, picture: Path) -> None:
    """Bytes that are sent again are read once; a hole is refused; replies go on where they were."""
    data = picture.read_bytes()
    third = len(data) // 3
    with served(vlm, Limits()) as address, stub_of(address) as stub, stub_of(address) as other:
        whole = Call(stub, start_of(data), chunk(data), end(len(data))).rest()
        first = Call(stub, start_of(data, passage=NAME), chunk(data[:third], 0))
        assert first.until("accepted")[-1].accepted.beat_seconds > 0
        first.until("received")
        first.cut()
        again = Call(other, resume(NAME, 1))
        resumed = again.until("resumed")[-1].resumed
        assert (resumed.bytes, resumed.complete) == (third, False)
        again.say(chunk(data[: third + 9], 0), chunk(data[5 : third + 9], 5), chunk(data[third + 9 :], third + 9))
        again.say(end(len(data)))
        rest = again.rest()
        assert rest[-1].done.text == whole[-1].done.text
        assert rest[-1].done.bytes_received == len(data)
        tokens = [reply.token.id for reply in rest if reply.HasField("token")]
        assert tokens == [reply.token.id for reply in whole if reply.HasField("token")]
        # what was said before the end can be had again, from anywhere on
        for seen in (1, 4, 1 + len(tokens)):
            late = Call(stub, resume(NAME, seen)).rest()
            assert parts(late) == ["resumed", *["token"] * (1 + len(tokens) - seen), "done"]
            assert [reply.token.id for reply in late[1:-1]] == tokens[seen - 1 :]
        assert Call(stub, resume(NAME, 99)).rest()[-1].error.kind == pb.ERROR_KIND_PROTOCOL
        assert Call(stub, resume(bytes(16), 0)).rest()[-1].error.kind == pb.ERROR_KIND_LOST
        taken = Call(stub, start_of(data, passage=NAME)).rest()
        assert taken[-1].error.kind == pb.ERROR_KIND_PROTOCOL
        hole = Call(stub, start_of(data, passage=bytes(16)), chunk(data[9:], 9)).rest()
        assert hole[-1].error.kind == pb.ERROR_KIND_PROTOCOL
        assert "bytes 0 to 9 are missing" in hole[-1].error.message


def test_a_call_that_hangs_about_is_taken_over(vlm: VLM, picture: Path) -> None:
    """The cloud need not know yet that a connection is dead."""
    data = picture.read_bytes()
    with served(vlm, Limits()) as address, stub_of(address) as stub, stub_of(address) as other:
        first = Call(stub, start_of(data, passage=NAME), chunk(data[:100], 0))
        first.until("accepted")
        again = Call(other, resume(NAME, 1))
        assert again.until("resumed")[-1].resumed.bytes <= 100
        assert "token" not in parts(first.rest())
        again.say(chunk(data, 0), end(len(data)))
        assert again.rest()[-1].done.tokens == 8


def test_only_the_caller_resumes_and_abandons(vlm: VLM, picture: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "tokens.toml", picture.read_bytes()
    one, two = new_token(file, "one"), new_token(file, "two")

    def abandon(passage: bytes, token: str) -> None:
        stub.Abandon(pb.AbandonRequest(passage=passage), metadata=(("authorization", f"Bearer {token}"),))

    with served(vlm, Limits(), file) as address, stub_of(address) as stub:
        first = Call(stub, start_of(data, passage=NAME), chunk(data[:100], 0), token=one)
        first.until("accepted")
        first.cut()
        assert Call(stub, resume(NAME, 1), token=two).rest()[-1].error.kind == pb.ERROR_KIND_LOST
        abandon(NAME, two)
        again = Call(stub, resume(NAME, 1), token=one)
        again.until("resumed")
        again.cut()
        abandon(NAME, one)
        for late in (resume(NAME, 1), start_of(data, passage=NAME)):
            assert Call(stub, late, token=one).rest()[-1].error.kind == pb.ERROR_KIND_LOST


def test_nobody_waits_for_an_edge_that_stays_away(vlm: VLM, picture: Path) -> None:
    data = picture.read_bytes()
    with served(vlm, Limits(resume_seconds=0.3, calls=1)) as address, stub_of(address) as stub:
        first = Call(stub, start_of(data, passage=NAME))
        first.until("accepted")
        first.cut()
        time.sleep(0.6)
        assert Call(stub, resume(NAME, 1)).rest()[-1].error.kind == pb.ERROR_KIND_LOST
    with served(vlm, Limits(calls=1)) as address, stub_of(address) as stub:
        late = Call(stub, start_of(data, passage=NAME), seconds=0.5)  # nobody waits beyond a question's deadline
        assert parts(late.until("accepted")) == ["accepted"]
        with pytest.raises(grpc.RpcError):
            late.rest()
        time.sleep(0.3)
        assert Call(stub, resume(NAME, 1)).rest()[-1].error.kind == pb.ERROR_KIND_LOST
        plain = Call(stub, start_of(data))
        plain.until("accepted")
        plain.cut()
        until(lambda: Edge(None, address).ask([], QUESTION, mode="prompt", max_new_tokens=1))
