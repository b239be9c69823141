"""Clouds that are away, dead, stopped or busy: a named error soon, never a hang."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from kvferry import VLM, Answer, DeadlineError, Edge, FingerprintError, InputError, LinkError, RecipeError
from kvferry.modes import BusyError
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"
LONG = 1024
"""Tokens of an answer that nobody would wait for."""


SOON = 20.0
"""Seconds; below the default deadline. Far less on a machine that is not busy."""


@contextmanager
def soon() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON


@pytest.fixture(scope="module", autouse=True)
def victim(model_folder: Path) -> Iterator[CloudProcess]:
    """A server to be mistreated; it starts while others are tested."""
    with CloudProcess(model_folder, "--max-waiting", "0", "--together", "2") as process:
        yield process


def assert_free(edge: Edge, picture: Path) -> None:
    """The cloud no longer talks to itself: the rest of a long answer would take dozens of short ones."""
    first, second = edge.ask([picture], QUESTION), edge.ask([picture], QUESTION)
    assert first.cloud.queue < 10 * second.cloud.total


def unused_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_cloud_away(vlm: VLM, picture: Path) -> None:
    for uplink in (None, "10mbit"):
        with soon(), Edge(vlm, unused_address(), uplink=uplink) as edge:
            with pytest.raises(LinkError, match="kvferry serve"):
                edge.ask([picture], QUESTION)
            with pytest.raises(LinkError, match="kvferry serve"):
                edge.describe()


def test_something_else_answers(vlm: VLM, picture: Path) -> None:
    """It accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent, soon():
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Edge(vlm, address, deadline=2) as edge, pytest.raises(LinkError):
            edge.ask([picture], QUESTION)


def test_wrong_model(cloud: CloudProcess, other_folder: Path, picture: Path) -> None:
    import kvferry

    with Edge(kvferry.load(str(other_folder)), cloud.address, uplink="10mbit") as edge:
        with pytest.raises(FingerprintError, match="same model"):
            edge.ask([picture], QUESTION)
        assert edge.ask([picture], QUESTION, mode="image").tokens == 16


def test_bad_questions(edge: Edge, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="empty"):
        edge.ask([picture], "  ")
    with pytest.raises(InputError, match="mode"):
        edge.ask([picture], QUESTION, mode="telepathy")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="q2c"):
        edge.ask([picture], QUESTION, recipe="q3c@0.25|int4")
    for mode in ("kv", "image"):
        for path in (tmp_path / "text.png", tmp_path / "absent.png"):
            with pytest.raises(InputError, match=r"picture|image"):
                edge.ask([path], QUESTION, mode=mode)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_new_tokens"):
        edge.ask([picture], QUESTION, max_new_tokens=0)
    with pytest.raises(InputError, match="max_new_tokens"):
        edge.ask([picture], QUESTION, max_new_tokens=100_000)
    with pytest.raises(InputError, match="deadline"):
        edge.ask([picture], QUESTION, deadline=-1)
    assert edge.ask([picture], QUESTION).tokens == 16


def test_deadline_on_a_slow_link(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    slow = Edge(vlm, cloud.address, uplink="64kbit")
    with slow as edge, soon(), pytest.raises(DeadlineError, match="smaller recipe"):
        edge.ask([picture], QUESTION, recipe="full|bf16", deadline=1)


def test_deadline_in_a_long_answer(edge: Edge, picture: Path) -> None:
    said: list[int] = []
    with soon(), pytest.raises(DeadlineError):
        edge.ask([picture], QUESTION, max_new_tokens=LONG, deadline=1, on_token=lambda token, _: said.append(token))
    assert len(said) < LONG
    assert_free(edge, picture)


def test_cancelled_from_the_callback(edge: Edge, picture: Path) -> None:
    def enough(_: int, __: str) -> None:
        raise KeyboardInterrupt

    with soon(), pytest.raises(KeyboardInterrupt):
        edge.ask([picture], QUESTION, max_new_tokens=LONG, on_token=enough)
    assert_free(edge, picture)


def test_cancelled_while_sending(cloud: CloudProcess, vlm: VLM, edge: Edge, picture: Path) -> None:
    with grpc.insecure_channel(cloud.address) as channel:
        start = pb.AskRequest.Start(mode=pb.MODE_KV, max_new_tokens=1, fingerprint=vlm.fingerprint, recipe="full|bf16")
        silence = threading.Event()

        def messages() -> Iterator[pb.AskRequest]:
            yield pb.AskRequest(start=start)
            silence.wait(10)

        call = service_pb2_grpc.FerryStub(channel).Ask(messages(), timeout=20)
        assert next(call).WhichOneof("part") == "accepted"
        call.cancel()
        silence.set()
    assert edge.ask([picture], QUESTION).tokens == 16


def test_busy_stopped_and_killed(victim: CloudProcess, vlm: VLM, picture: Path) -> None:
    """One server, in this order: too much to do, frozen, killed while it speaks to one and listens to another."""
    with Edge(vlm, victim.address) as talker, Edge(vlm, victim.address, uplink="1mbit", deadline=100) as edge:
        assert edge.ask([picture], QUESTION).tokens == 16
        with Edge(vlm, victim.address) as second, talking(talker, None), talking(second, None):
            with grpc.insecure_channel(victim.address) as channel:
                start = pb.AskRequest.Start(mode=pb.MODE_PROMPT, question=QUESTION, max_new_tokens=1)
                first = next(service_pb2_grpc.FerryStub(channel).Ask(iter([pb.AskRequest(start=start)]), timeout=20))
            assert first.error.kind == pb.ERROR_KIND_BUSY, "before it has sent anything"
            assert 0 < first.error.retry_seconds <= 10
            answer = edge.ask([picture], QUESTION, fallback="local")
            assert (answer.mode, "before this one" in answer.why_local) == ("local", True)
            patient = ThreadPoolExecutor(1).submit(edge.ask, [picture], QUESTION)
            time.sleep(0.2)
        assert patient.result(60).tokens == 16, "it asked again when it was told to"

        victim.process.send_signal(signal.SIGSTOP)
        with soon(), pytest.raises(DeadlineError):
            edge.ask([picture], QUESTION, deadline=1)
        victim.process.send_signal(signal.SIGCONT)
        with soon():
            assert asked_until_free(edge, picture).tokens == 16  # it first hears that nobody wants the old one

        with soon(), talking(talker, LinkError), pytest.raises(LinkError, match="went away"):
            edge.ask([picture], QUESTION, recipe="full|bf16", on_sent=lambda *_: victim.process.kill())
        for each in (edge, talker):
            with soon(), pytest.raises(LinkError, match="kvferry serve"):
                each.ask([picture], QUESTION)


def asked_until_free(edge: Edge, picture: Path) -> Answer:
    while True:
        try:
            return edge.ask([picture], QUESTION)
        except BusyError:
            time.sleep(0.05)


@contextmanager
def talking(edge: Edge, ends_in: type[LinkError] | None) -> Iterator[None]:
    """Another thread listens to a long answer for as long as this lasts, or until it breaks."""
    speaking, enough = threading.Event(), threading.Event()
    ended: list[type[BaseException] | None] = []

    def heard(_: int, __: str) -> None:
        speaking.set()
        if enough.is_set():
            raise StopIteration

    def listen() -> None:
        try:
            edge.ask([], QUESTION, recipe="full|bf16", max_new_tokens=LONG, deadline=100, on_token=heard)
        except StopIteration:
            ended.append(None)
        except LinkError as error:
            ended.append(type(error))

    thread = threading.Thread(target=listen)
    thread.start()
    assert speaking.wait(60)
    yield
    enough.set()
    thread.join(SOON)
    assert ended == [ends_in]
