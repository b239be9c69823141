"""Answers from what has arrived, between two processes, over links that are too slow or stop."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import kvferry
from kvferry import VLM, DeadlineError, Edge, InputError
from kvferry.bitstream import Reader
from kvferry.bitstream.records import START
from kvferry.link import ShapedLink
from kvferry.modes import Holdings, Question
from kvferry.modes.kv import KVMode, KVReceiver
from kvferry.wire import service_pb2 as pb
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"
RECIPE = "knorm@0.9|bf16"
BY = 3.0
"""Seconds; a third of the cache arrives in it at 100 kbit/s, less what prefill takes."""


@dataclass
class Stops:
    """A link that delivers so many bytes at once and then nothing more."""

    left: int
    piece_bytes: int = 1500

    def departure(self, nbytes: int, arrived: float) -> float:
        self.left -= nbytes
        return arrived if self.left >= 0 else arrived + 3600


def answer_from(vlm: VLM, stream: bytes, share: float) -> str:
    """What the model says here on the first bytes that hold this share of the tokens."""
    reader = Reader()
    for begin in range(0, len(stream), 64):
        reader.feed(stream[begin : begin + 64])
        if reader.frames and reader.header is not None:
            try:
                partial = reader.partial()
            except kvferry.TruncatedError:
                continue
            if partial.share == pytest.approx(share):
                return vlm.answer(partial.cache)
    raise AssertionError(f"no prefix of what was sent holds {share} of the tokens")


def test_a_third_arrives(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    pictures, whole = [picture] * 2, io.BytesIO()
    with Edge(vlm, cloud.address) as edge:
        full = edge.ask(pictures, QUESTION, recipe=RECIPE, tiers=8, keep=whole, answer_by=30)
    assert (full.share, full.partial) == (1.0, False)
    with Edge(vlm, cloud.address, uplink="200kbit") as edge:
        began = time.monotonic()
        answer = edge.ask(pictures, QUESTION, recipe=RECIPE, tiers=8, answer_by=BY)
        assert BY < time.monotonic() - began < 25
        assert answer.partial
        assert 0.05 < answer.share < 0.6
        assert answer.as_dict()["partial"]
        assert answer.text == answer_from(vlm, whole.getvalue(), answer.share)
        assert answer.wire_bytes_up is not None
        assert answer.bitstream_bytes < answer.wire_bytes_up < 0.6 * full.bitstream_bytes
        again = edge.ask([picture], QUESTION, recipe="knorm@0.05|int4")  # the connection lives on
        assert not again.partial


def test_the_link_stops(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    with ShapedLink(cloud.address, uplink=Stops(60_000)) as link, Edge(vlm, link.address) as edge:
        answer = edge.ask([picture], QUESTION, recipe=RECIPE, tiers=8, answer_by=BY)
    assert 0.2 < answer.share < 0.8
    assert answer.tokens == 16


@pytest.mark.parametrize(("mode", "tiers"), [("kv:knorm@0.9|bf16", 1), ("kv:full|bf16", 4), ("image", 1)])
def test_nothing_usable_is_no_answer(cloud: CloudProcess, vlm: VLM, picture: Path, mode: str, tiers: int) -> None:
    said: list[int] = []
    with ShapedLink(cloud.address, uplink=Stops(4_000)) as link, Edge(vlm, link.address) as edge:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="time to answer"):
            edge.ask([picture], QUESTION, mode=mode, tiers=tiers, answer_by=BY, on_token=lambda i, _: said.append(i))
        assert time.monotonic() - began < 25, "the deadline is 30 s"
    assert not said


def test_bad_hurries(edge: Edge, vlm: VLM, cloud: CloudProcess, picture: Path) -> None:
    for answer_by in (0.0, -1.0, 1000.0, float("nan")):
        with pytest.raises(InputError, match="answer_by"):
            edge.ask([picture], QUESTION, answer_by=answer_by)
    import grpc

    from kvferry.wire import service_pb2_grpc

    with grpc.insecure_channel(cloud.address) as channel:
        for wrong in (float("nan"), float("inf"), -1.0):
            start = pb.AskRequest.Start(
                mode=pb.MODE_KV, max_new_tokens=1, fingerprint=vlm.fingerprint, recipe="full|bf16", answer_by=wrong
            )
            reply = next(service_pb2_grpc.FerryStub(channel).Ask(iter([pb.AskRequest(start=start)]), timeout=20))
            assert reply.error.kind == pb.ERROR_KIND_PROTOCOL


def test_steps_are_whole_caches_one_after_the_other(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    small, large = "knorm@0.1|int4", RECIPE
    alone = {}
    with Edge(vlm, cloud.address) as edge:
        for recipe in (small, large):
            alone[recipe] = edge.ask([picture], QUESTION, recipe=recipe)
        both = edge.ask([picture], QUESTION, mode=f"kv:{small};{large}")
        assert (both.text, both.share, both.recipe) == (alone[large].text, 1.0, f"{small};{large}")
        assert both.bitstream_bytes == sum(x.bitstream_bytes for x in alone.values())
        scene = [edge.ask([picture], text, recipe=f"{small};{large}", ship_first=True) for text in (QUESTION, "why?")]
        assert scene[1].bitstream_bytes < 100, "the cloud holds the last of them"
    arrives = alone[small].bitstream_bytes + 20_000
    with ShapedLink(cloud.address, uplink=Stops(arrives)) as link, Edge(vlm, link.address) as edge:
        first = edge.ask([picture], QUESTION, mode=f"kv:{small};{large}", answer_by=BY)
    assert (first.text, first.share, first.partial) == (alone[small].text, 0.5, True)


def test_bad_steps(edge: Edge, picture: Path) -> None:
    with pytest.raises(kvferry.RecipeError):
        edge.ask([picture], QUESTION, mode="kv:full|int4;")
    with pytest.raises(InputError, match="at most 4"):
        edge.ask([picture], QUESTION, mode="kv:" + ";".join(["full|int4"] * 5))


class NoShelf:
    """A session that holds nothing."""

    def take(self, handle: int, kind: type[object]) -> object:
        raise AssertionError("nothing is held")

    def put(self, digest: bytes, item: object, nbytes: int) -> None:
        """Not kept."""

    def drop(self, handle: int) -> None:
        """Nothing is there."""

    def reserve(self, nbytes: int) -> None:
        """There is room."""


def test_what_is_missing_of_the_steps(vlm: VLM, picture: Path) -> None:
    mode = KVMode.parse("knorm@0.1|int4;full|int4;full|bf16")
    sender = mode.sender(vlm, Question([picture], QUESTION), Holdings())
    start = sender.start()
    sender.prepare()
    chunks = list(sender.chunks())
    begins = [i for i, chunk in enumerate(chunks) if chunk.startswith(START)]
    for count, match in ((begins[1], "1 of 3 caches"), (begins[2], "2 of 3 caches"), (len(chunks) - 1, "trailer")):
        receiver = KVReceiver(vlm, start, NoShelf(), 1 << 30)
        for chunk in chunks[:count]:
            receiver.feed(chunk)
        with pytest.raises(kvferry.TruncatedError, match=match):
            receiver.finish()
        assert receiver.settle() == pytest.approx(sum(begin <= count for begin in begins[1:]) / 3)
