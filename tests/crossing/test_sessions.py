"""Several questions in one session: what crosses once, what is lost and sent again, and who sees whose."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from PIL import Image

from kvferry import VLM, Answer, Edge, LinkError
from kvferry.modes import Holdings, LocalMode, Question, Sender, parse_mode
from kvferry.modes.digests import file_digest
from kvferry.pictures import identify
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.process import CloudProcess

QUESTIONS = ("what colour is the circle?", "how many squares are there?", "which word is on the sign?")
ALL = ("image", "image:60", "embeds:int8", "scout:vlcache@0.25", "kv:knorm@0.5|int8")


def ask(edge: Edge, images: Sequence[Path | Image.Image], question: str, mode: str) -> Answer:
    return edge.ask(images, question, mode=mode, ship_first=mode.startswith("kv"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.png"
    Image.linear_gradient("L").resize((208, 192)).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("mode", ALL)
def test_a_picture_crosses_once(cloud: CloudProcess, vlm: VLM, picture: Path, other: Path, mode: str) -> None:
    """Answers are those of an edge without a session; what is new crosses, what is old does not."""
    with Edge(vlm, cloud.address, deadline=100) as edge, Edge(vlm, cloud.address, deadline=100, hold=False) as plain:
        first = ask(edge, [picture], QUESTIONS[0], mode)
        assert first.text == ask(plain, [picture], QUESTIONS[0], mode).text
        for question in QUESTIONS[1:]:
            later, whole = ask(edge, [picture], question, mode), ask(plain, [picture], question, mode)
            assert later.text == whole.text
            assert later.bitstream_bytes < 60 < 1000 < whole.bitstream_bytes
            assert later.payload_bytes_up < 300
            assert (later.kept, later.bf16_bytes) == (whole.kept, whole.bf16_bytes)
        both, whole = ask(edge, [picture, other], QUESTIONS[0], mode), ask(plain, [picture, other], QUESTIONS[0], mode)
        assert both.text == whole.text
        if mode.startswith("kv"):
            assert both.bitstream_bytes == whole.bitstream_bytes  # another scene
        else:
            assert 500 < both.bitstream_bytes < whole.bitstream_bytes - 1000


def test_pictures_that_only_look_alike(cloud: CloudProcess, vlm: VLM) -> None:
    """Equal pixels in another shape are another picture."""
    with Edge(vlm, cloud.address, deadline=100) as edge:
        for mode in ("embeds", "kv:knorm@0.5|int8"):
            sizes = [(192, 224), (224, 192)]
            sent = [ask(edge, [Image.new("RGB", size, "red")], QUESTIONS[0], mode).bitstream_bytes for size in sizes]
            assert min(sent) > 100
            again = [ask(edge, [Image.new("RGB", size, "red")], QUESTIONS[0], mode).bitstream_bytes for size in sizes]
            assert again == [0, 0]


@pytest.fixture(scope="module")
def forgetful(model_folder: Path) -> Iterator[CloudProcess]:
    with CloudProcess(model_folder, "--session-seconds", "0.05") as process:
        yield process


@pytest.mark.parametrize("mode", ALL)
def test_what_was_forgotten_is_sent_again(forgetful: CloudProcess, vlm: VLM, picture: Path, mode: str) -> None:
    with Edge(vlm, forgetful.address, deadline=100) as edge:
        first = ask(edge, [picture], QUESTIONS[0], mode)
        time.sleep(0.1)
        again = ask(edge, [picture], QUESTIONS[0], mode)
        assert again.text == first.text
        assert again.bitstream_bytes >= first.bitstream_bytes


def test_no_room_for_it(model_folder: Path, vlm: VLM, picture: Path) -> None:
    with CloudProcess(model_folder, "--max-session-bytes", "1000") as process, Edge(vlm, process.address) as edge:
        first, again = (edge.ask([picture], QUESTIONS[0], mode="image", deadline=100) for _ in range(2))
        assert first.bitstream_bytes == again.bitstream_bytes == picture.stat().st_size


def until_back(edge: Edge) -> None:
    """gRPC waits a little before it tries to connect once more."""
    for _ in range(100):
        try:
            edge.describe()
        except LinkError:
            time.sleep(0.1)
        else:
            return


def test_cloud_killed_and_started_again(model_folder: Path, vlm: VLM, picture: Path) -> None:
    """Its sessions are gone; the edge finds out, and every mode's answer is what it was."""
    with CloudProcess(model_folder) as process, Edge(vlm, process.address, uplink="1mbit", deadline=100) as edge:
        address = process.address
        first = {mode: ask(edge, [picture], QUESTIONS[0], mode) for mode in ALL}
        process.process.kill()
        process.process.wait()
        with pytest.raises(LinkError, match="kvferry serve"):
            edge.ask([picture], QUESTIONS[0], mode="image")
        with CloudProcess(model_folder, "--listen", address) as second:
            assert second.address == address
            until_back(edge)
            for mode in ALL:
                again = ask(edge, [picture], QUESTIONS[0], mode)
                assert again.text == first[mode].text
                assert again.bitstream_bytes >= first[mode].bitstream_bytes or mode.startswith("scout")
            image = Image.radial_gradient("L").resize((240, 240))
            with pytest.raises(LinkError, match="went away"):
                edge.ask([image], QUESTIONS[0], mode="embeds", on_sent=lambda *_: second.process.kill())
            answer = edge.ask([picture], QUESTIONS[0], mode="image", fallback="local")
            assert (answer.mode, answer.text) == ("local", vlm.answer(vlm.prefill([picture], QUESTIONS[0]).cache))
            assert "kvferry serve" in answer.why_local


def test_no_second_voice(model_folder: Path, vlm: VLM, picture: Path) -> None:
    """A cloud that dies in the middle of its answer is not continued by the edge."""
    said: list[str] = []

    def kill(_: int, text: str) -> None:
        said.append(text)
        process.process.kill()

    with CloudProcess(model_folder) as process, Edge(vlm, process.address, deadline=100) as edge:
        options = {"mode": "image", "fallback": "local", "max_new_tokens": 1000, "on_token": kill}
        with pytest.raises(LinkError, match="went away"):
            edge.ask([picture], QUESTIONS[0], **options)  # type: ignore[arg-type]
    assert 0 < len(said) < 1000


def test_one_session_never_sees_another(cloud: CloudProcess, picture: Path) -> None:
    """Handles are small numbers, and worth nothing without the id that goes with them."""
    data = picture.read_bytes()
    with grpc.insecure_channel(cloud.address) as channel:
        stub = service_pb2_grpc.FerryStub(channel)

        def say(session: bytes, *items: pb.AskRequest.Item, data: bytes = b"") -> pb.AskReply:
            start = pb.AskRequest.Start(
                mode=pb.MODE_IMAGE, question=QUESTIONS[0], max_new_tokens=2, items=items, session=session, hold=True
            )
            chunks = [pb.AskRequest(chunk=pb.AskRequest.Chunk(data=data))] if data else []
            end = pb.AskRequest(end=pb.AskRequest.End(bytes=len(data)))
            return list(stub.Ask(iter([pb.AskRequest(start=start), *chunks, end]), timeout=60))[-1]

        whole = pb.AskRequest.Item(digest=file_digest(data, identify(data)), size=len(data))
        first, second = (say(b"", whole, data=data).done for _ in range(2))
        assert len(first.session) == 16
        assert first.session != second.session
        handle = first.holdings[0].handle
        assert say(first.session, pb.AskRequest.Item(handle=handle)).done.text == first.text
        for session, number in ((b"", handle), (bytes(16), handle), (second.session[:-1], handle), (first.session, 99)):
            reply = say(session, pb.AskRequest.Item(handle=number))
            assert reply.error.kind == pb.ERROR_KIND_NOT_HELD
            assert "send it again" in reply.error.message


def test_a_scene_is_the_picture_that_its_digest_names(vlm: VLM, picture: Path, tmp_path: Path) -> None:
    """A camera overwrites its file between the two looks at it."""
    path = tmp_path / "camera.png"
    path.write_bytes(picture.read_bytes())

    def sender() -> Sender:
        mode = parse_mode("kv:knorm@0.5|int8")
        assert not isinstance(mode, LocalMode)
        return mode.sender(vlm, Question([path], QUESTIONS[0], ship_first=True), Holdings())

    before = sender()
    digest = before.start().items[0].digest
    Image.new("RGB", (224, 224), "red").save(path)
    before.prepare()
    stream = b"".join(before.chunks())
    path.write_bytes(picture.read_bytes())
    again = sender()
    assert again.start().items[0].digest == digest
    again.prepare()
    assert b"".join(again.chunks()) == stream
