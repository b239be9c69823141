"""A good client beside hostile ones: served as usual, whatever they send; real processes on both sides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvferry import VLM
from kvferry.wire import service_pb2_grpc
from tests.crossing.hostile.attacks import KINDS, Attacker
from tests.crossing.hostile.fuzz import fuzzed, wrong
from tests.crossing.hostile.sender import begin, ended, told
from tests.crossing.process import CloudProcess

NOISE = 0.25
"""Seconds by which a shared machine may be late."""
CLIENTS, SECONDS = 2, 0.5


@pytest.fixture(scope="module")
def attacker(vlm: VLM) -> Attacker:
    return Attacker(vlm)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[CloudProcess]:
    with CloudProcess(model_folder) as process:
        yield process
        assert process.stop() == 0


class Good:
    """An honest client with a small picture."""

    def __init__(self, server: CloudProcess, attacker: Attacker) -> None:
        self._channel = grpc.insecure_channel(server.address)
        self._stub = service_pb2_grpc.FerryStub(self._channel)
        self._call = attacker.image([attacker.picture])

    def seconds(self) -> float:
        began = time.perf_counter()
        assert ended(self._stub, self._call) == "done"
        return time.perf_counter() - began

    def usual(self) -> float:
        return statistics.median(self.seconds() for _ in range(7))


@pytest.fixture(scope="module")
def good(server: CloudProcess, attacker: Attacker) -> Good:
    client = Good(server, attacker)
    for kind in ("3,500 old tokens recalled", "coded frames"):  # what a first request loads is none of its fault
        told(begin(server.address, 0, 1, KINDS[kind][0](attacker)))
        client.usual()
    return client


def resident(server: CloudProcess) -> int:
    """Bytes of memory that the server has."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


@pytest.mark.parametrize("kind", KINDS)
def test_is_served_as_usual(server: CloudProcess, attacker: Attacker, good: Good, kind: str) -> None:
    build, answers = KINDS[kind]
    call = build(attacker)
    before, memory = good.usual(), resident(server)
    process = begin(server.address, SECONDS, CLIENTS, call)
    waits = [good.seconds()]
    while process.poll() is None:
        waits.append(good.seconds())
    assert set(told(process)) <= set(answers)
    usual = max(before, good.usual())
    assert statistics.mean(waits) < 2 * usual + NOISE
    if Path("/proc/self/status").exists():
        until = time.monotonic() + 15
        while resident(server) > (most := 1.1 * memory) and time.monotonic() < until:
            time.sleep(0.2)
        assert resident(server) <= most


def test_wrong_things_at_random(server: CloudProcess, vlm: VLM, good: Good) -> None:
    """``python -m tests.crossing.hostile.fuzz`` does so for longer, and counts."""
    ends = fuzzed(server.address, vlm, seconds=2, seed=0)
    assert not wrong(ends)
    assert len(ends) > 2
    good.seconds()
