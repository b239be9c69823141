"""A cloud whose threads do not come back: it says so, others are told, and it ends in time all the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvferry import Edge, LinkError
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.process import ENVIRONMENT
from tests.crossing.stuck import ANSWERING, FEEDING, FOREVER

QUESTION = "what colour is the circle?"
DAY = 86_400


def start(mode: int, question: str) -> pb.AskRequest:
    return pb.AskRequest(start=pb.AskRequest.Start(mode=mode, question=question, max_new_tokens=2))  # type: ignore[arg-type]


def messages(*given: pb.AskRequest) -> Iterator[pb.AskRequest]:
    yield from given
    time.sleep(20)  # the call stays open


@pytest.fixture
def cloud(model_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Its clock is a day slow."""
    command = [sys.executable, "-m", "tests.crossing.stuck", str(model_folder), str(-DAY)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_threads_that_do_not_come_back(cloud: tuple[subprocess.Popen[str], str]) -> None:
    process, address = cloud
    chunk = pb.AskRequest(chunk=pb.AskRequest.Chunk(data=b"x"))
    end = pb.AskRequest(end=pb.AskRequest.End())
    with grpc.insecure_channel(address) as channel, Edge(None, address, deadline=60, reconnect_seconds=0.5) as edge:
        stub, health = service_pb2_grpc.FerryStub(channel), health_pb2_grpc.HealthStub(channel)

        def status() -> Any:
            return health.Check(health_pb2.HealthCheckRequest(), timeout=20).status

        # no deadline, session or certificate minds that the clocks differ by a day
        assert abs(edge.describe()["unix_seconds"] - time.time() + DAY) < 100
        assert edge.ask([], QUESTION, mode="prompt").tokens == 16
        assert status() == health_pb2.HealthCheckResponse.SERVING

        # a step of 3 s is longer than it should be, and then ends
        slow = stub.Ask(messages(start(ANSWERING, "3 seconds"), end), timeout=60)
        for wanted in (health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING):
            while status() != wanted:
                time.sleep(0.1)
        assert [reply.WhichOneof("part") for reply in slow][-1] == "done"

        # both threads are gone for good, and SIGTERM comes
        feeding = stub.Ask(messages(start(FEEDING, QUESTION), chunk, end), timeout=60)
        answering = stub.Ask(messages(start(ANSWERING, f"{FOREVER} seconds"), end), timeout=60)
        for call in (feeding, answering):
            assert next(call).WhichOneof("part") == "accepted"
        assert edge.describe()["has_vision"]  # nobody waits for them to be told what there is
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        time.sleep(0.5)
        with pytest.raises(LinkError, match="shutting down"):
            edge.ask([], QUESTION, mode="prompt")
        for call in (feeding, answering):
            assert list(call)[-1].error.kind == pb.ERROR_KIND_ENDING
        assert process.wait(20) == 0
        assert time.monotonic() - began < 3 + 5  # 3 s, on a machine that others use too
