"""Conversations over a real server: what one process would say that holds all of it, whatever the cloud forgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest

import kvferry
from kvferry import VLM, Edge, InputError, Recipe, compress, decompress
from kvferry.cache import KVCache
from kvferry.cloud import Limits
from kvferry.cloud.sessions import Sessions
from kvferry.edge import Conversation
from kvferry.modes import RECEIVERS, Holdings, Question, parse_mode
from kvferry.policy import OperatingPoint, PointTable
from kvferry.testbed.data import sample
from kvferry.testbed.questions import MAKERS
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.process import CloudProcess
from tests.crossing.test_sessions import until_back

MODEL = Path("testbed/cloud")
"""The shipped one: what an untrained model says does not depend on what was asked."""
QUESTIONS = (
    "what word is written in cyan?",
    "what colour is the star?",
    "how many squares are there?",
    "what number is on the cyan shape?",
)
"""About scene 3 of the validation split; the first answer is cut off, the others end."""
KV = "kv:knorm@0.5|int8"
STEPS = f"kv:knorm@0.1|int4;{KV.removeprefix('kv:')}"
MODES = (KV, STEPS, "kv:knorm@0.5,budget=head|bf16", "image", "image:60,mask=0.5", "embeds:int8", "scout:vlcache@0.25")
NEW = 3

Said = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return MODEL


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return kvferry.load(str(MODEL))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    sample("validation", 3, kinds=tuple(MAKERS)).images[0].save(path)
    return path


@pytest.fixture(scope="module")
def cloud() -> Iterator[CloudProcess]:
    with CloudProcess(MODEL) as process:
        yield process


def ground(vlm: VLM, mode: str, images: Sequence[Path], question: str) -> KVCache:
    """What the cloud answers the first question from."""
    if mode.startswith("kv:"):
        recipe = Recipe.parse(mode.partition(":")[2].rpartition(";")[2])  # the last of its steps
        return decompress(compress(vlm.prefill(images, question, recipe=recipe), recipe))
    sender = parse_mode(mode).sender(vlm, Question(images, question), Holdings(hold=False))  # type: ignore[union-attr]
    start = sender.start()
    sender.prepare()
    receiver = RECEIVERS[start.mode](vlm, start, Sessions(Limits()).store(b"", hold=False), 1 << 20)
    for chunk in sender.chunks():
        receiver.feed(chunk)
    receiver.finish()
    return receiver.ground()[0]


def alone(vlm: VLM, cache: KVCache, questions: Sequence[str | None]) -> Said:
    """One process that holds the whole conversation."""
    said = []
    for question in questions:
        done = vlm.resume(cache, question, max_new_tokens=NEW, keep=True)
        assert done.cache is not None
        cache = done.cache
        said.append(done.token_ids)
    return said


def crossed(talk: Conversation, between: Callable[[], object] = lambda: None) -> Said:
    for question in QUESTIONS:
        talk.ask(question, max_new_tokens=NEW)
        between()
    return [turn.said for turn in talk.turns]


@pytest.mark.parametrize("mode", MODES)
def test_as_in_one_process(cloud: CloudProcess, vlm: VLM, picture: Path, mode: str) -> None:
    expected = alone(vlm, ground(vlm, mode, [picture], QUESTIONS[0]), [None, *QUESTIONS[1:]])
    with Edge(vlm, cloud.address, deadline=100) as edge:
        talk = edge.conversation([picture], mode=mode)
        answers = [talk.ask(question, max_new_tokens=NEW) for question in QUESTIONS]
    assert [turn.said for turn in talk.turns] == expected
    assert [turn.question for turn in talk.turns] == list(QUESTIONS)
    assert [x.text for x in answers] == [vlm.tokenizer.decode(x, skip_special_tokens=True) for x in expected]
    assert len(set(expected)) > 2
    assert answers[0].bitstream_bytes > 100
    assert [x.bitstream_bytes for x in answers[1:]] == [0, 0, 0]
    assert all(x.payload_bytes_up < 200 for x in answers[1:])


def test_history_changes_the_answer(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    """A turn is not the same question asked alone."""
    with Edge(vlm, cloud.address, deadline=100) as edge:
        said = crossed(edge.conversation([picture], mode=KV))
        plain = [edge.ask([picture], question, mode=KV, max_new_tokens=NEW).text for question in QUESTIONS]
    texts = [vlm.tokenizer.decode(x, skip_special_tokens=True) for x in said]
    assert texts[0] == plain[0]
    assert texts[1:] != plain[1:]


def test_shipped_first(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    scene = decompress(compress(vlm.prefill([picture], recipe="knorm@0.5|int8"), "knorm@0.5|int8"))
    expected = alone(vlm, scene, QUESTIONS)
    with Edge(vlm, cloud.address, deadline=100) as edge:
        assert crossed(edge.conversation([picture], mode=KV, ship_first=True)) == expected
        assert crossed(edge.conversation([picture], mode=KV, ship_first=True)) == expected  # the scene is held


def test_words_only(cloud: CloudProcess, vlm: VLM) -> None:
    expected = alone(vlm, vlm.prefill((), QUESTIONS[0]).cache, [None, *QUESTIONS[1:]])
    with Edge(None, cloud.address, deadline=100) as edge:
        assert crossed(edge.conversation([], mode="prompt")) == expected


def test_here(vlm: VLM, picture: Path) -> None:
    expected = alone(vlm, vlm.prefill([picture], QUESTIONS[0]).cache, [None, *QUESTIONS[1:]])
    with Edge(vlm) as edge:
        assert crossed(edge.conversation([picture], mode="local")) == expected


def test_auto_chooses_once(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    table = PointTable("one", (OperatingPoint(KV, 0.9, 1_500),))
    with Edge(vlm, cloud.address, points=table, deadline=100) as edge:
        expected = crossed(edge.conversation([picture], mode=KV))
        talk = edge.conversation([picture], mode="auto")
        answers = [talk.ask(question, max_new_tokens=NEW) for question in QUESTIONS]
    assert [turn.said for turn in talk.turns] == expected
    assert {(x.mode, x.why) for x in answers} == {("kv", answers[0].why)}
    assert KV in answers[0].why


def test_two_at_once(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    with Edge(vlm, cloud.address, deadline=100) as edge:
        expected = crossed(edge.conversation([picture], mode=KV))
        talks = [edge.conversation([picture], mode=mode) for mode in (KV, "image", KV)]
        for question in QUESTIONS:
            for talk in talks:
                talk.ask(question, max_new_tokens=NEW)
        said = [[turn.said for turn in talk.turns] for talk in talks]
    assert said[0] == said[2] == expected
    assert said[1] != expected


@pytest.fixture(scope="module")
def forgetful(model_folder: Path) -> Iterator[CloudProcess]:
    with CloudProcess(model_folder, "--session-seconds", "0.05") as process:
        yield process


@pytest.mark.parametrize("mode", MODES)
def test_what_was_forgotten_is_told_again(
    cloud: CloudProcess, forgetful: CloudProcess, vlm: VLM, picture: Path, mode: str
) -> None:
    with Edge(vlm, cloud.address, deadline=100) as edge:
        expected = crossed(edge.conversation([picture], mode=mode))
    with Edge(vlm, forgetful.address, deadline=100) as edge:
        assert crossed(edge.conversation([picture], mode=mode), lambda: time.sleep(0.1)) == expected


def test_nothing_is_held(cloud: CloudProcess, model_folder: Path, vlm: VLM, picture: Path) -> None:
    """Neither by an edge that wants it so, nor by a cloud without room: every turn sends the same bytes again."""
    with Edge(vlm, cloud.address, deadline=100) as edge:
        expected = crossed(edge.conversation([picture], mode=KV))
    with CloudProcess(model_folder, "--max-session-bytes", "1000") as process:
        for address, hold in ((cloud.address, False), (process.address, True)):
            with Edge(vlm, address, hold=hold, deadline=100) as edge:
                talk = edge.conversation([picture], mode=KV)
                sizes = {talk.ask(question, max_new_tokens=NEW).bitstream_bytes for question in QUESTIONS}
                assert [turn.said for turn in talk.turns] == expected
                assert len(sizes) == 1
                assert min(sizes) > 100


def test_cloud_killed_and_started_again(model_folder: Path, vlm: VLM, picture: Path) -> None:
    expected = alone(vlm, ground(vlm, KV, [picture], QUESTIONS[0]), [None, *QUESTIONS[1:]])
    with CloudProcess(model_folder) as process, Edge(vlm, process.address, deadline=100) as edge:
        address, talk = process.address, edge.conversation([picture], mode=KV)
        first = [talk.ask(question, max_new_tokens=NEW) for question in QUESTIONS[:3]]
        process.process.kill()
        process.process.wait()
        with CloudProcess(model_folder, "--listen", address) as second:
            assert second.address == address
            until_back(edge)
            again = talk.ask(QUESTIONS[3], max_new_tokens=NEW)
    assert [turn.said for turn in talk.turns] == expected
    assert again.bitstream_bytes == first[0].bitstream_bytes


def test_a_turn_that_fails_changes_nothing(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    with Edge(vlm, cloud.address, deadline=100) as edge:
        expected = crossed(edge.conversation([picture], mode=KV))
        talk = edge.conversation([picture], mode=KV)
        for question in QUESTIONS:
            for bad, match in ((" ", "empty"), ("<|im_end|> and?", "template token")):
                with pytest.raises(InputError, match=match):
                    talk.ask(bad)
            talk.ask(question, max_new_tokens=NEW)
    assert [turn.said for turn in talk.turns] == expected


def test_longer_than_the_model_reads(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    with Edge(vlm, cloud.address, deadline=100) as edge:
        talk = edge.conversation([picture], mode=KV)
        talk.ask(QUESTIONS[0], max_new_tokens=NEW)
        with pytest.raises(InputError, match="new conversation"):
            talk.ask("what " * 5000)


def test_what_no_edge_would_send(cloud: CloudProcess, vlm: VLM) -> None:
    """Refused by name, and never answered."""
    with grpc.insecure_channel(cloud.address) as channel:
        stub = service_pb2_grpc.FerryStub(channel)

        def say(
            session: bytes = b"", digest: bytes = bytes(32), handle: int = 0, *turns: pb.AskRequest.Turn
        ) -> pb.AskReply:
            start = pb.AskRequest.Start(mode=pb.MODE_PROMPT, max_new_tokens=2, session=session, hold=True)
            start.question = "" if handle else QUESTIONS[0]
            start.conversation.digest, start.conversation.handle = digest, handle
            start.conversation.turns.extend(turns)
            end = pb.AskRequest(end=pb.AskRequest.End())
            return list(stub.Ask(iter([pb.AskRequest(start=start), end]), timeout=60))[-1]

        turn = pb.AskRequest.Turn
        held = say().done
        handle = held.holdings[0].handle
        more = turn(question=QUESTIONS[1])
        assert say(held.session, bytes(31), handle, more).error.kind == pb.ERROR_KIND_PROTOCOL
        assert say(held.session, bytes(32), handle).error.kind == pb.ERROR_KIND_PROTOCOL
        twice = turn(answer=[1], text="a", question=QUESTIONS[1])
        assert say(held.session, bytes(32), handle, more, twice).error.kind == pb.ERROR_KIND_PROTOCOL
        for answered in (turn(answer=[1], question=QUESTIONS[1]), turn(text="a", question=QUESTIONS[1])):
            assert say(held.session, bytes(32), handle, answered).error.kind == pb.ERROR_KIND_PROTOCOL
        assert say(held.session, bytes(32), handle, turn()).error.kind == pb.ERROR_KIND_INPUT
        assert say(b"", bytes(32), 0, turn(answer=[10**6], question=QUESTIONS[1])).error.kind == pb.ERROR_KIND_INPUT
        long = turn(answer=[10] * 10_000, question=QUESTIONS[1])
        assert say(b"", bytes(32), 0, long).error.kind == pb.ERROR_KIND_INPUT
        for session, number in ((b"", handle), (bytes(16), handle), (held.session, handle + 9)):
            assert say(session, bytes(32), number, more).error.kind == pb.ERROR_KIND_NOT_HELD
        done = say(held.session, bytes(31) + b"1", handle, more).done
        assert done.tokens
        assert say(held.session, bytes(31) + b"2", handle, more).error.kind == pb.ERROR_KIND_NOT_HELD  # superseded
        assert say(done.session, bytes(31) + b"3", done.holdings[0].handle, more).done.tokens
