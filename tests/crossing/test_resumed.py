"""Connections that break under way: the question goes on by another one, and its answer is what it would have been."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvferry import VLM, Answer, CancelledError, Edge, LinkError
from kvferry.edge import watch
from kvferry.edge.call import Outgoing, Replies
from kvferry.edge.stream import Cancel
from kvferry.edge.supply import Supply
from kvferry.link import parse_address
from kvferry.wire import service_pb2 as pb
from tests.crossing.cutter import Cutter
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"
LARGE = "full|bf16"


def asked(
    edge: Edge, picture: Path, do: Callable[[int], None] = lambda _: None, **options: object
) -> tuple[Answer, list[int]]:
    """The answer, its tokens as they were said; ``do`` is told how many bytes are acknowledged."""
    said: list[int] = []
    answer = edge.ask(
        [picture],
        QUESTION,
        recipe=LARGE,
        on_token=lambda token, _: said.append(token),
        on_sent=lambda done, _: do(done),
        **options,
    )  # type: ignore[arg-type]
    return answer, said


def test_cut_again_and_again_while_sending(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    """What has arrived is not sent again."""
    with Cutter(cloud.address) as cutter, Edge(vlm, cutter.address, deadline=100, hold=False) as edge:
        whole, said = asked(edge, picture)
        carried, cuts = cutter.up_bytes, [whole.bitstream_bytes * part // 4 for part in (1, 2, 3)]

        def cut(acknowledged: int) -> None:
            if cuts and acknowledged >= cuts[0]:
                cuts.pop(0)
                cutter.cut()

        again, said_again = asked(edge, picture, cut)
        assert not cuts
        assert 1 < cutter.connections <= 4  # one cut may find what was acknowledged before still to be read
        assert (again.text, said_again) == (whole.text, said)
        assert again.bitstream_bytes == whole.bitstream_bytes
        assert cutter.up_bytes - carried < 2 * carried
        assert asked(edge, picture)[0].text == whole.text


@pytest.mark.parametrize("mode", ["image", "kv"])
def test_cut_while_the_answer_is_said(cloud: CloudProcess, vlm: VLM, picture: Path, mode: str) -> None:
    """No word is lost, none is said twice."""
    with Cutter(cloud.address) as cutter, Edge(vlm, cutter.address, deadline=100, hold=False) as edge:
        whole = edge.ask([picture], QUESTION, mode=mode, max_new_tokens=200)
        said: list[str] = []

        def cut(_: int, text: str) -> None:
            said.append(text)
            if len(said) in (2, 50, 51, 150):
                cutter.cut()

        again = edge.ask([picture], QUESTION, mode=mode, max_new_tokens=200, on_token=cut)
        assert again.text == whole.text
        assert len(said) == again.tokens == whole.tokens
        assert whole.text.startswith("".join(said))
        assert cutter.connections >= 4


def test_a_connection_that_hangs_is_given_up(
    cloud: CloudProcess, vlm: VLM, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is closed, nothing comes: the beats are missed, and another connection goes on."""
    monkeypatch.setattr(watch, "SILENT_BEATS", 1.5)
    with Cutter(cloud.address) as cutter, Edge(vlm, cutter.address, deadline=100, hold=False) as edge:
        whole, said = asked(edge, picture)
        began = time.monotonic()
        hung: list[int] = []

        def hang(acknowledged: int) -> None:
            if not hung and acknowledged > whole.bitstream_bytes // 2:
                hung.append(acknowledged)
                cutter.hang()

        again, said_again = asked(edge, picture, hang)
        assert hung
        assert (again.text, said_again) == (whole.text, said)
        assert 2.9 < time.monotonic() - began < 60


@pytest.mark.parametrize(("seconds", "least"), [(0.0, 0.0), (1.0, 0.5)])
def test_no_way_back(cloud: CloudProcess, vlm: VLM, picture: Path, seconds: float, least: float) -> None:
    """An error within the time that the edge tries for; no time at all where it is told so."""
    gone: list[float] = []
    cutter = Cutter(cloud.address)

    def away(_: int) -> None:
        gone.append(time.monotonic())
        cutter.__exit__(None, None, None)

    edge = Edge(vlm, cutter.address, deadline=100, reconnect_seconds=seconds)
    with edge, pytest.raises(LinkError, match="went away"):
        asked(edge, picture, away)
    assert least <= time.monotonic() - gone[0] < 20


def test_called_off_while_it_looks_for_a_way_back(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    cancel = Cancel()
    with Cutter(cloud.address) as cutter, Edge(vlm, cutter.address, deadline=100, reconnect_seconds=60) as edge:

        def away(_: int) -> None:
            cutter.__exit__(None, None, None)
            threading.Timer(0.3, cancel.cancel).start()

        with pytest.raises(CancelledError):
            asked(edge, picture, away, cancel=cancel)


def test_a_cloud_that_returns_is_found_at_once(model_folder: Path, vlm: VLM, picture: Path) -> None:
    """Killed in the middle of a question and started again: the edge asks it anew, by itself. And asked while it was
    away, it is found as soon as it is back."""
    with CloudProcess(model_folder) as process, Edge(vlm, process.address, deadline=100, reconnect_seconds=90) as edge:
        address = process.address
        whole, said = asked(edge, picture)
        second: list[CloudProcess] = []

        def kill(_: int) -> None:
            if not second:
                process.process.kill()
                process.process.wait()
                second.append(CloudProcess(model_folder, "--listen", address))

        try:
            again, said_again = asked(edge, picture, kill)
            assert (again.text, said_again) == (whole.text, said)
            assert second[0].address == address
            second[0].process.kill()
            second[0].process.wait()
            for _ in range(8):  # gRPC by itself would wait longer and longer before it tried again
                with pytest.raises(LinkError, match="kvferry serve"):
                    edge.describe()
            with socket.create_server(parse_address(address)), pytest.raises(LinkError):
                edge.ask([picture], QUESTION, deadline=1)  # somebody is there, who says nothing
        finally:
            for each in second:
                with each:
                    pass


def replies_of(said: list[int], *parts: pb.AskReply) -> tuple[Replies, list[int]]:
    replies, heard = Replies(said), []
    replies.hear(iter(parts))
    outgoing = Outgoing(pb.AskRequest.Start(), False, None)
    replies.until_done(outgoing, lambda token, _: heard.append(token), None)
    return replies, heard


def test_what_was_said_does_not_change() -> None:
    """A cloud that has lost a question answers it again: the same words are not said twice, others are an error."""
    tokens = [pb.AskReply(token=pb.AskReply.Token(id=number)) for number in (7, 8, 9)]
    done = pb.AskReply(done=pb.AskReply.Done(tokens=3))
    replies, heard = replies_of([7, 8], *tokens, done)
    assert (replies.token_ids, heard) == ([7, 8, 9], [9])
    for other in ([7, 7], [7, 8, 9, 10]):
        with pytest.raises(LinkError, match="another one now"):
            replies_of(other, *tokens, done)


def test_bytes_are_made_once() -> None:
    made: list[bytes] = []
    supply = Supply(iter([b"abc", b"", b"de"]), made.append)
    assert [supply.read(0), supply.read(1), supply.read(3), supply.read(5)] == [b"abc", b"bc", b"de", b""]
    supply.acknowledged(4)
    assert supply.read(4) == b"e"
    with pytest.raises(ValueError, match="byte 2"):
        supply.read(2)
    assert made == [b"abc", b"de"]

    def fails() -> object:
        yield b"x"
        raise LinkError("no more")

    broken = Supply(fails(), made.append)  # type: ignore[arg-type]
    assert broken.read(0) == b"x"
    for _ in range(2):  # whoever asks again must not take it for the end
        with pytest.raises(LinkError):
            broken.read(1)
