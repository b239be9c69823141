"""A cloud's process for large pictures, seen from outside: it comes when needed, may die, and holds up nobody."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvferry import VLM
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.hostile.attacks import Attacker, scanned
from tests.crossing.process import CloudProcess

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at the processes of Linux")


@pytest.fixture(scope="module")
def attacker(vlm: VLM) -> Attacker:
    return Attacker(vlm)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[CloudProcess]:
    with CloudProcess(model_folder) as process:
        yield process
        assert process.stop() == 0


@pytest.fixture
def stub(server: CloudProcess) -> Iterator[service_pb2_grpc.FerryStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield service_pb2_grpc.FerryStub(channel)


def children(server: CloudProcess) -> list[int]:
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def child(server: CloudProcess, there: bool = True) -> int:
    """Wait for it, or for its end."""
    end = time.monotonic() + 30
    while bool(found := children(server)) != there:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found[0] if there else 0


def last(replies: Iterator[pb.AskReply]) -> pb.AskReply:
    *_, reply = replies
    return reply


def test_it_comes_when_needed_and_may_die(
    server: CloudProcess, stub: service_pb2_grpc.FerryStub, attacker: Attacker
) -> None:
    small = attacker.image([attacker.picture])
    large = attacker.image([scanned(50, 5000)])
    assert last(stub.Ask(iter(small))).HasField("done")
    assert not children(server)
    replies = stub.Ask(iter(large))
    pid = child(server)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    error = last(replies).error
    assert error.kind == pb.ERROR_KIND_INPUT
    assert "ended by SIGKILL" in error.message
    assert last(stub.Ask(iter(attacker.image([scanned(0, 2000)])))).HasField("done")
    assert child(server) != pid


def test_it_ends_with_the_question_and_holds_up_nobody(
    server: CloudProcess, stub: service_pb2_grpc.FerryStub, attacker: Attacker
) -> None:
    large = attacker.image([scanned(50, 5000)])
    replies = stub.Ask(iter(large), timeout=60)
    pid = child(server)
    time.sleep(0.2)
    assert last(stub.Ask(iter(attacker.image([attacker.picture])))).HasField("done")  # meanwhile
    assert pid in children(server)
    replies.cancel()
    child(server, there=False)
    with pytest.raises(grpc.RpcError) as late:  # so does a deadline
        last(stub.Ask(iter(large), timeout=0.5))
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    child(server, there=False)
