"""A client that says wrong things. Each is refused by name, and the server answers the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import kvferry
from kvferry import VLM
from kvferry.modes.digests import file_digest
from kvferry.pictures import identify
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from kvferry.wire.faults import KINDS, from_wire
from tests.crossing.process import CloudProcess

RECIPE = "q2c@0.25|int4"
QUESTION = "what colour is the circle?"


@pytest.fixture(scope="module")
def blob(vlm: VLM, picture: Path) -> bytes:
    return kvferry.compress(vlm.prefill([picture], QUESTION, recipe=RECIPE), RECIPE)


@pytest.fixture(scope="module")
def stub(cloud: CloudProcess) -> Iterator[service_pb2_grpc.FerryStub]:
    with grpc.insecure_channel(cloud.address) as channel:
        yield service_pb2_grpc.FerryStub(channel)


class Client:
    """Sends whatever it is told to."""

    def __init__(self, stub: service_pb2_grpc.FerryStub, vlm: VLM) -> None:
        self._stub = stub
        self._vlm = vlm

    def start(self, **changes: object) -> pb.AskRequest:
        given: dict[str, object] = {
            "mode": pb.MODE_KV,
            "max_new_tokens": 2,
            "fingerprint": self._vlm.fingerprint,
            "recipe": RECIPE,
        }
        return pb.AskRequest(start=pb.AskRequest.Start(**given | changes))

    def say(self, *messages: pb.AskRequest) -> pb.AskReply:
        """The last reply."""
        return list(self._stub.Ask(iter(messages), timeout=20))[-1]

    def send(self, data: bytes, start: pb.AskRequest | None = None, chunk: int = 10_000) -> pb.AskReply:
        pieces = [data[i : i + chunk] for i in range(0, len(data), chunk)]
        chunks = [pb.AskRequest(chunk=pb.AskRequest.Chunk(data=piece)) for piece in pieces]
        return self.say(start or self.start(), *chunks, pb.AskRequest(end=pb.AskRequest.End(bytes=len(data))))


@pytest.fixture
def client(stub: service_pb2_grpc.FerryStub, vlm: VLM, blob: bytes) -> Iterator[Client]:
    """Afterwards the server must still answer."""
    client = Client(stub, vlm)
    yield client
    assert client.send(blob).done.tokens == 2


def kind(reply: pb.AskReply) -> str:
    assert reply.error.message, reply
    return pb.ErrorKind.Name(reply.error.kind).removeprefix("ERROR_KIND_")


def test_truncated_anywhere(client: Client, blob: bytes) -> None:
    for end in [0, 1, 3, 4, 10, *range(50, len(blob), len(blob) // 12), len(blob) - 1]:
        assert kind(client.send(blob[:end])) == "TRUNCATED"


def test_flipped_anywhere(client: Client, blob: bytes) -> None:
    for where in [0, 2, 4, 5, 9, 20, *range(60, len(blob), len(blob) // 25), len(blob) - 1]:
        bad = bytearray(blob)
        bad[where] ^= 0x40
        assert kind(client.send(bytes(bad))) in ("CORRUPT", "TRUNCATED", "VERSION"), where


def test_chunks_of_any_size(client: Client, blob: bytes) -> None:
    assert client.send(blob, chunk=1009).done.bytes_received == len(blob)
    assert client.send(blob, chunk=500_000).done.bytes_received == len(blob)


def test_newer_version(client: Client, blob: bytes) -> None:
    reply = client.send(blob[:3] + b"\xf0" + blob[4:])
    assert kind(reply) == "VERSION"
    assert "update" in reply.error.message


def test_not_a_bitstream(client: Client) -> None:
    assert kind(client.send(b"GET / HTTP/1.1\r\n" * 100)) == "CORRUPT"


def test_bytes_after_the_end(client: Client, blob: bytes) -> None:
    assert kind(client.send(blob + b"x")) == "CORRUPT"


def test_other_model(client: Client, blob: bytes, other_folder: Path, picture: Path) -> None:
    assert kind(client.say(client.start(fingerprint="ab" * 16))) == "FINGERPRINT"
    other = kvferry.load(str(other_folder))
    theirs = kvferry.compress(other.prefill([picture], QUESTION, recipe=RECIPE), RECIPE)
    assert kind(client.send(theirs)) == "FINGERPRINT"  # although its start says otherwise


@pytest.mark.parametrize("recipe", ["q2c@0.25|int44", "q2c@0.25|int4|zstdd", "q2c@0.25", ""])
def test_unknown_recipe(client: Client, recipe: str) -> None:
    reply = client.say(client.start(recipe=recipe))
    assert kind(reply) == "VERSION"
    assert repr(recipe) in reply.error.message


def test_a_selection_need_not_be_known(client: Client, blob: bytes) -> None:
    """A cloud decodes what a newer edge, or a researcher's own method, selected."""
    assert client.send(blob, client.start(recipe="q3c@0.25|int4")).done.tokens == 2


def test_no_file_that_a_recipe_names_is_opened(client: Client, tmp_path: Path) -> None:
    """``tiny@FILE`` is a preset of the edge's own; a cloud that opened it would wait at this pipe for ever."""
    pipe = tmp_path / "presets.json"
    os.mkfifo(pipe)
    assert kind(client.say(client.start(recipe=f"tiny@{pipe}"))) == "VERSION"


def test_question_twice_or_never(client: Client, blob: bytes, vlm: VLM, picture: Path) -> None:
    assert kind(client.send(blob, client.start(question=QUESTION))) == "INPUT"
    scene = kvferry.compress(vlm.prefill([picture]), "full|int4")
    assert kind(client.send(scene)) == "INPUT"


@pytest.mark.parametrize("tokens", [0, 1_000_000])
def test_answer_length(client: Client, tokens: int) -> None:
    assert kind(client.say(client.start(max_new_tokens=tokens))) == "INPUT"


def test_out_of_order(client: Client, blob: bytes) -> None:
    chunk = pb.AskRequest(chunk=pb.AskRequest.Chunk(data=blob))
    end = pb.AskRequest(end=pb.AskRequest.End(bytes=len(blob)))
    start = client.start()
    assert kind(client.say()) == "PROTOCOL"
    assert kind(client.say(chunk)) == "PROTOCOL"
    assert kind(client.say(pb.AskRequest())) == "PROTOCOL"
    assert kind(client.say(start, start)) == "PROTOCOL"
    assert kind(client.say(start, pb.AskRequest())) == "PROTOCOL"
    assert kind(client.say(client.start(mode=77))) == "PROTOCOL"
    assert kind(client.say(start, chunk)) == "TRUNCATED"
    assert kind(client.say(start, chunk, pb.AskRequest(end=pb.AskRequest.End(bytes=1)))) == "PROTOCOL"
    assert client.say(start, chunk, end).done.tokens == 2


def test_pictures(client: Client, picture: Path) -> None:
    data = picture.read_bytes()
    digest = file_digest(data, identify(data))

    def start(*sizes: int, question: str = QUESTION, digest: bytes = digest) -> pb.AskRequest:
        items = [pb.AskRequest.Item(size=size, digest=digest) for size in sizes]
        return client.start(mode=pb.MODE_IMAGE, question=question, items=items)

    assert kind(client.send(b"no picture", start(10))) == "INPUT"
    cut = data[:-100]
    assert kind(client.send(cut, start(len(cut), digest=file_digest(cut, identify(cut))))) == "INPUT"
    assert kind(client.send(cut, start(len(cut)))) == "CORRUPT"
    assert kind(client.send(data, start(len(data), digest=b""))) == "CORRUPT"
    assert kind(client.send(data[:-100], start(len(data)))) == "TRUNCATED"
    assert kind(client.send(data + b"xx", start(len(data)))) == "PROTOCOL"
    assert kind(client.send(data, start(len(data), question=" "))) == "INPUT"
    assert kind(client.say(start(1 << 40))) == "INPUT"
    assert kind(client.say(start(*[1] * 1000))) == "INPUT"
    assert client.send(data, start(len(data))).done.tokens == 2


def test_message_too_large_for_grpc(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.send(bytes(3_000_000), chunk=3_000_000)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_every_error_survives_the_wire() -> None:
    for error, number in KINDS.items():
        back = from_wire(pb.AskReply.Error(kind=number, message="what to do"))
        assert type(back) is error
        assert str(back) == "what to do"
    assert type(from_wire(pb.AskReply.Error(kind=99))) is kvferry.KVFerryError
