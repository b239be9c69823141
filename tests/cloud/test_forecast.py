"""What the model cannot end in time is refused before it begins, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvferry import VLM
from kvferry.cloud.forecast import ENOUGH, Forecast
from kvferry.errors import DeadlineError
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.fixtures import model_folder, vlm
from tests.crossing.hostile.attacks import Attacker
from tests.crossing.process import CloudProcess

__all__ = ["model_folder", "vlm"]


def test_nothing_is_refused_by_a_cloud_that_has_measured_nothing() -> None:
    Forecast().check(10**6, 1024, 0.001)


def test_the_fastest_passes_count() -> None:
    forecast = Forecast()
    forecast.read(100, 10.0)  # the first one loads things
    forecast.read(100, 1.0)
    forecast.said(0.5)
    assert forecast.seconds(1000, 64) == pytest.approx(10 + 0.5)
    forecast.check(1000, 64, 10.6)
    with pytest.raises(DeadlineError, match=r"1,000 tokens and saying 1 takes 10\.5 s .* 10\.4 s are left"):
        forecast.check(1000, 64, 10.4)


def test_answers_are_as_long_as_those_before_them() -> None:
    """Where they were cut off, nothing is known beyond that; the shortest that ended by itself counts."""
    forecast = Forecast()
    for _ in range(ENOUGH - 1):
        forecast.ended(16, by_itself=False)
    assert forecast.answer_tokens(1000) == 1
    forecast.ended(16, by_itself=False)
    assert forecast.answer_tokens(1000) == 16
    assert forecast.answer_tokens(4) == 4
    forecast.ended(300, by_itself=False)
    assert forecast.answer_tokens(1000) == 16
    forecast.ended(3, by_itself=True)
    assert forecast.answer_tokens(1000) == 3


@pytest.fixture(scope="module")
def stub(model_folder: Path) -> Iterator[service_pb2_grpc.FerryStub]:
    with CloudProcess(model_folder) as server:
        with grpc.insecure_channel(server.address) as channel:
            yield service_pb2_grpc.FerryStub(channel)
        assert server.stop() == 0


def told(stub: service_pb2_grpc.FerryStub, call: list[pb.AskRequest]) -> list[pb.AskReply]:
    return list(stub.Ask(iter(call), timeout=120))


def test_a_cloud_refuses_before_it_accepts(model_folder: Path, vlm: VLM) -> None:
    """The first such question fails in the middle; what was measured then refuses the next one at its start."""
    long = Attacker(vlm).recalled(3500)
    with CloudProcess(model_folder, "--max-seconds", "0.1") as server, grpc.insecure_channel(server.address) as channel:
        stub = service_pb2_grpc.FerryStub(channel)
        for _ in range(10):
            replies = told(stub, long)
            assert replies[-1].error.kind == pb.ERROR_KIND_DEADLINE
            if "reading 3,500 tokens" in replies[-1].error.message:
                break
        assert [reply.WhichOneof("part") for reply in replies] == ["error"]
        assert "allow more time" in replies[0].error.message


def test_announced_sizes_are_checked(stub: service_pb2_grpc.FerryStub, vlm: VLM) -> None:
    attacker = Attacker(vlm)
    call = attacker.image([attacker.picture])
    call[0].start.items[0].width = call[0].start.items[0].height = 9000
    assert told(stub, call)[-1].error.kind == pb.ERROR_KIND_PROTOCOL
    call[0].start.items[0].width = call[0].start.items[0].height = 9500  # more than may be: nothing needs to come
    only = told(stub, call[:1])
    assert [reply.WhichOneof("part") for reply in only] == ["error"]
    assert only[0].error.kind == pb.ERROR_KIND_INPUT
    call[0].start.items[0].width = call[0].start.items[0].height = 224
    assert told(stub, call)[-1].HasField("done")
