"""Turns that the edge answers, turns with a new picture, and turns on a part of a cache, against one process."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvferry import VLM, DeadlineError, Edge, InputError, LinkError, Recipe, compress, decompress
from kvferry.bitstream import Reader
from kvferry.cache import KVCache
from kvferry.link import ShapedLink, relay
from kvferry.modes import brought_up
from kvferry.policy import OperatingPoint, PointTable
from kvferry.testbed.data import sample
from kvferry.testbed.questions import MAKERS
from tests.crossing.process import CloudProcess
from tests.crossing.test_conversation import (
    KV,
    MODES,
    NEW,
    QUESTIONS,
    alone,
    cloud,
    forgetful,
    ground,
    model_folder,
    picture,
    vlm,
)
from tests.crossing.test_faults import unused_address
from tests.crossing.test_progressive import Stops
from tests.crossing.test_sessions import until_back

__all__ = ["cloud", "forgetful", "model_folder", "picture", "vlm"]

RECIPE = Recipe.parse("knorm@0.9|bf16")
TIERS = 8
STOP = 40_000
"""Bytes after which a link stops: about a third of that cache."""


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another picture."""
    path = tmp_path_factory.mktemp("scene") / "second.png"
    sample("validation", 5, kinds=tuple(MAKERS)).images[0].save(path)
    return path


def told(vlm: VLM, cache: KVCache, said: Sequence[Sequence[int]], asked: Sequence[str]) -> tuple[int, ...]:
    """What one process says after a first question that lies in the cache, and others."""
    longer, question = brought_up(vlm, cache, None, said, asked)
    return vlm.resume(longer, question, max_new_tokens=NEW).token_ids


class Gate:
    """A link at an address that stays: it can be lost, and be there again."""

    def __init__(self, target: str, monkeypatch: pytest.MonkeyPatch, uplink: Stops | None = None) -> None:
        self.address = unused_address()
        self._target = target
        host, _, port = self.address.rpartition(":")
        monkeypatch.setattr(relay, "_listen", lambda: _listening(host, int(port)))
        self.open(uplink)

    def open(self, uplink: Stops | None = None) -> None:
        self._link = ShapedLink(self._target, uplink)

    def shut(self) -> None:
        self._link.close()


def _listening(host: str, port: int) -> socket.socket:
    listener = socket.create_server((host, port))
    listener.setblocking(False)
    return listener


@pytest.mark.parametrize("mode", [KV, "image", "scout:vlcache@0.25"])
def test_the_edge_answers_in_between(
    cloud: CloudProcess, vlm: VLM, picture: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cloud keeps what it has, and is told in words what was said without it."""
    gate = Gate(cloud.address, monkeypatch)
    with Edge(vlm, gate.address, deadline=100) as edge:
        talk = edge.conversation([picture], mode=mode, fallback="local")
        first = talk.ask(QUESTIONS[0], max_new_tokens=NEW)
        gate.shut()
        here = [talk.ask(question, max_new_tokens=NEW) for question in QUESTIONS[1:3]]
        gate.open()
        until_back(edge)
        last = talk.ask(QUESTIONS[3], max_new_tokens=NEW)
    gate.shut()
    assert [x.mode for x in (first, *here, last)] == [mode.partition(":")[0], "local", "local", mode.partition(":")[0]]
    assert all("cannot be reached or went away" in x.why_local for x in here)
    assert last.bitstream_bytes == 0, "the cloud held its part"
    own = vlm.prefill([picture], QUESTIONS[0]).cache
    words = vlm.answer_ids(first.text)
    one = told(vlm, own, [words], QUESTIONS[1:2])
    two = told(vlm, own, [words, one], QUESTIONS[1:3])
    assert [turn.said for turn in talk.turns[1:3]] == [one, two]
    assert [turn.here for turn in talk.turns] == [False, True, True, False]
    theirs = ground(vlm, mode, [picture], QUESTIONS[0])
    said = [talk.turns[0].said, *(vlm.answer_ids(x.text) for x in here)]
    assert talk.turns[3].said == told(vlm, theirs, said, QUESTIONS[1:])


def test_a_link_is_lost_midway(cloud: CloudProcess, vlm: VLM, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first turn's cache was half sent: the edge answers, and the next turn sends all of it."""
    gate = Gate(cloud.address, monkeypatch, Stops(STOP))
    with Edge(vlm, gate.address, deadline=100) as edge:
        talk = edge.conversation([picture], recipe=RECIPE, tiers=TIERS, fallback="local")
        loses = threading.Timer(1.5, gate.shut)
        loses.start()
        here = talk.ask(QUESTIONS[0], max_new_tokens=NEW)
        loses.join()
        gate.open()
        until_back(edge)
        there = talk.ask(QUESTIONS[1], max_new_tokens=NEW)
    gate.shut()
    assert (here.mode, there.mode, there.share) == ("local", "kv", 1.0)
    assert there.bitstream_bytes > 2 * STOP
    cache = decompress(compress(vlm.prefill([picture], QUESTIONS[0], recipe=RECIPE), RECIPE))
    assert talk.turns[1].said == told(vlm, cache, [vlm.answer_ids(here.text)], QUESTIONS[1:2])


def test_a_conversation_begins_without_a_cloud(model_folder: Path, vlm: VLM, picture: Path) -> None:
    """The cloud comes, answers, is killed and comes again; the edge answers while there is none."""
    address = unused_address()
    with Edge(vlm, address, deadline=100) as edge:
        talk = edge.conversation([picture], mode=KV, fallback="local")
        answers = [talk.ask(QUESTIONS[0], max_new_tokens=NEW)]
        for _ in range(2):
            with CloudProcess(model_folder, "--listen", address) as process:
                assert process.address == address, "and the first question that is asked of it is answered"
                answers.append(talk.ask(QUESTIONS[len(answers)], max_new_tokens=NEW))
        answers.append(talk.ask(QUESTIONS[3], max_new_tokens=NEW))
    assert [x.mode for x in answers] == ["local", "kv", "kv", "local"]
    assert answers[1].bitstream_bytes == answers[2].bitstream_bytes > 100
    theirs, own = ground(vlm, KV, [picture], QUESTIONS[0]), vlm.prefill([picture], QUESTIONS[0]).cache
    words = [vlm.answer_ids(x.text) for x in answers]
    said = [turn.said for turn in talk.turns]
    assert said[0] == alone(vlm, own, [None])[0]
    assert said[1] == told(vlm, theirs, words[:1], QUESTIONS[1:2])
    assert said[2] == told(vlm, theirs, [words[0], said[1]], QUESTIONS[1:3])
    assert said[3] == told(vlm, own, [said[0], *words[1:3]], QUESTIONS[1:])


def test_without_a_fallback_a_turn_fails(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    """And where time is over, with one too: nothing has changed then."""
    with Edge(vlm, unused_address(), deadline=100) as edge, pytest.raises(LinkError):
        edge.conversation([picture], mode=KV).ask(QUESTIONS[0])
    with Edge(None, cloud.address) as edge, pytest.raises(InputError, match="needs a model"):
        edge.conversation([picture], mode="image", fallback="local")
    expected = alone(vlm, ground(vlm, KV, [picture], QUESTIONS[0]), [None, *QUESTIONS[1:]])
    with Edge(vlm, cloud.address, deadline=100) as edge:
        talk = edge.conversation([picture], mode=KV, fallback="local")
        for question in QUESTIONS:
            with pytest.raises(DeadlineError):
                talk.ask(question, deadline=0.001)
            talk.ask(question, max_new_tokens=NEW)
    assert [turn.said for turn in talk.turns] == expected


def test_auto_falls_back_to_its_local_point(
    vlm: VLM, picture: Path, monkeypatch: pytest.MonkeyPatch, cloud: CloudProcess
) -> None:
    gate = Gate(cloud.address, monkeypatch)
    table = PointTable("two", (OperatingPoint(KV, 0.9, 1_500), OperatingPoint("local", 0.1, 0)))
    with Edge(vlm, gate.address, points=table, deadline=100) as edge:
        talk = edge.conversation([picture], mode="auto")
        first = talk.ask(QUESTIONS[0], max_new_tokens=NEW)
        gate.shut()
        second = talk.ask(QUESTIONS[1], max_new_tokens=NEW)
    assert (first.mode, second.mode) == ("kv", "local")


@pytest.mark.parametrize("where", ["cloud", "forgetful"])
@pytest.mark.parametrize("mode", [*MODES, "local"])
def test_a_picture_joins(
    request: pytest.FixtureRequest, vlm: VLM, picture: Path, second: Path, mode: str, where: str
) -> None:
    """It stands behind the first one from then on; what was said before stays as it was said."""
    process: CloudProcess = request.getfixturevalue(where)
    both = [picture, second]
    with Edge(vlm, process.address, deadline=100) as edge:
        talk = edge.conversation([picture], mode=mode)
        answers = []
        for number, question in enumerate(QUESTIONS):
            with pytest.raises(InputError):
                talk.ask(question, images=[second.with_name("nowhere.png")])
            answers.append(talk.ask(question, images=second if number == 2 else (), max_new_tokens=NEW))
            time.sleep(0.1 if where == "forgetful" else 0)
    if mode == "local":
        before, after = (vlm.prefill(images, QUESTIONS[0]).cache for images in ([picture], both))
    else:
        before, after = (ground(vlm, mode, images, QUESTIONS[0]) for images in ([picture], both))
    said = [turn.said for turn in talk.turns]
    assert said[:2] == alone(vlm, before, [None, QUESTIONS[1]])
    for number in (2, 3):
        assert said[number] == told(vlm, after, said[:number], QUESTIONS[1 : number + 1])
    if where == "cloud" and mode != "local":
        assert answers[2].bitstream_bytes > 100
        assert answers[3].bitstream_bytes == 0
    if mode == "image" and where == "cloud":
        assert answers[2].bitstream_bytes == second.stat().st_size, "the first picture was held"


def test_in_tiers(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    cache = decompress(compress(vlm.prefill([picture], QUESTIONS[0], recipe=RECIPE), RECIPE))
    with Edge(vlm, cloud.address, deadline=100) as edge:
        talk = edge.conversation([picture], recipe=RECIPE, tiers=TIERS)
        answers = [talk.ask(question, max_new_tokens=NEW, answer_by=60) for question in QUESTIONS]
    assert [turn.said for turn in talk.turns] == alone(vlm, cache, [None, *QUESTIONS[1:]])
    assert [x.share for x in answers] == [1.0] * 4


@pytest.mark.parametrize("ship_first", [False, True])
@pytest.mark.parametrize("where", ["cloud", "forgetful"])
def test_on_a_part(
    request: pytest.FixtureRequest,
    vlm: VLM,
    picture: Path,
    where: str,
    ship_first: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first turn is answered from what arrived; so are all others, and a cloud that lost it takes as much again."""
    process: CloudProcess = request.getfixturevalue(where)
    whole = io.BytesIO()
    with Edge(vlm, process.address, deadline=100) as edge:
        edge.ask([picture], QUESTIONS[0], recipe=RECIPE, tiers=TIERS, ship_first=ship_first, keep=whole)
    gate = Gate(process.address, monkeypatch, Stops(STOP))
    with Edge(vlm, gate.address, deadline=100) as edge:
        talk = edge.conversation([picture], recipe=RECIPE, tiers=TIERS, ship_first=ship_first)
        answers = [talk.ask(QUESTIONS[0], max_new_tokens=NEW, answer_by=2)]
        gate.shut()
        gate.open()
        until_back(edge)
        for question in QUESTIONS[1:]:
            time.sleep(0.1 if where == "forgetful" else 0)
            answers.append(talk.ask(question, max_new_tokens=NEW))
    gate.shut()
    reader = Reader()
    reader.feed(whole.getvalue()[: answers[0].bitstream_bytes])
    partial = reader.partial()
    assert 0.1 < partial.share < 0.9
    assert [x.share for x in answers] == [pytest.approx(partial.share)] * 4
    questions = QUESTIONS if ship_first else (None, *QUESTIONS[1:])
    assert [turn.said for turn in talk.turns] == alone(vlm, partial.cache, questions)
    sent_again = answers[0].bitstream_bytes if where == "forgetful" else 0
    assert [x.bitstream_bytes for x in answers[1:]] == [sent_again] * 3
