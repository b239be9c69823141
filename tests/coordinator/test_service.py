"""``kvferry coordinate`` and its members as processes: they come, vanish, freeze; it dies and returns."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from kvferry.edge.membership import Membership
from kvferry.edge.pacing import Meter
from kvferry.errors import InputError, LinkError
from kvferry.policy import OperatingPoint
from kvferry.wire import coordinate_pb2 as pb
from kvferry.wire import coordinate_pb2_grpc, service_pb2
from tests.coordinator.agent import POINTS
from tests.coordinator.process import AgentProcess, CoordinatorProcess, within
from tests.crossing.process import COMMAND, ENVIRONMENT

LEASE = 1.5


@pytest.fixture(scope="module")
def coordinator() -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess("8mbit", "127.0.0.1:0", "--method", "equal", "--lease", str(LEASE)) as process:
        yield process


def member(address: str, *points: OperatingPoint) -> Membership:
    return Membership(address, points or POINTS, 1.0, Meter())


def mbit(membership: Membership) -> float:
    share = membership.share()
    return math.nan if share is None else round(share.bits_per_second / 1e6, 2)


def test_they_share_while_they_are_there(coordinator: CoordinatorProcess) -> None:
    one = member(coordinator.address)
    share = one.share(20.0)
    assert share is not None
    assert (share.bits_per_second, share.mode, share.members) == (8e6, POINTS[0].mode, 1)
    two = member(coordinator.address)
    assert within(5, lambda: mbit(one) == 4 == mbit(two)) < 1
    two.close()
    assert within(5, lambda: mbit(one) == 8) < 1
    time.sleep(2 * LEASE)
    assert mbit(one) == 8, "a lease is renewed"
    one.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_who_vanishes_gives_its_share_back(coordinator: CoordinatorProcess, how: signal.Signals) -> None:
    """A killed process closes its connection; a frozen one, like one behind a dead link, does not."""
    with AgentProcess(coordinator.address) as other:
        assert other.line() == [8e6, 1]
        one = member(coordinator.address)
        assert other.line() == [4e6, 2]
        within(5, lambda: mbit(one) == 4)
        other.process.send_signal(how)
        took = within(10, lambda: mbit(one) == 8)
        assert (took > LEASE / 3) == (how is signal.SIGSTOP)
        if how is signal.SIGSTOP:
            other.process.send_signal(signal.SIGCONT)
            within(10, lambda: mbit(one) == 4)  # it joins again
        one.close()


IDLE = 1.0


def test_who_asks_nothing_leaves_its_share_to_the_others() -> None:
    """Both come back to it within a moment of asking; a lease is kept all the while."""
    options = ("--method", "equal", "--lease", str(LEASE), "--idle", str(IDLE))
    with CoordinatorProcess("8mbit", "127.0.0.1:0", *options) as coordinator:
        one, two = (member(coordinator.address, *POINTS, OperatingPoint("scout", 0.3, 1000)) for _ in range(2))
        with one.asking():
            assert one.share(20.0) is not None
            assert two.share(20.0) is not None
            within(10, lambda: mbit(two) == 0.01 and mbit(one) == 7.99)
            time.sleep(2 * IDLE)
            assert mbit(one) == 7.99, "it asks as long as its question takes"
            began = time.monotonic()
            with two.asking():
                share = two.share(20.0)
                assert share is not None
                assert (share.bits_per_second, share.resting, share.members) == (4e6, False, 2)
                assert time.monotonic() - began < 0.5
        within(10, lambda: mbit(one) == 0.01 == mbit(two))
        one.close()
        two.close()


def test_a_rest_ends_with_the_coordinator_that_gave_it() -> None:
    """It freezes before it hears of the question, and dies; the next one takes the agent in as one that asks."""
    options = ("--lease", "10", "--idle", str(IDLE))
    with CoordinatorProcess("8mbit", "127.0.0.1:0", *options) as first:
        address, one = first.address, member(first.address)
        within(10, lambda: (share := one.share()) and share.resting)
        first.process.send_signal(signal.SIGSTOP)
        with one.asking():
            began = time.monotonic()
            share = one.share(20.0)
            assert share is not None
            assert (share.resting, share.bits_per_second) == (True, 0.0)
            assert time.monotonic() - began < 1, "the question does not wait for long"
            first.process.kill()
            within(10, lambda: one.share() is None)
            with CoordinatorProcess("6mbit", address, *options):
                within(10, lambda: mbit(one) == 6)
                time.sleep(2 * IDLE)
                assert mbit(one) == 6, "the question is still under way"
    one.close()


def test_the_coordinator_dies_and_returns() -> None:
    meter = Meter()
    with CoordinatorProcess("8mbit", "127.0.0.1:0", "--lease", str(LEASE)) as first:
        address, one = first.address, Membership(first.address, POINTS, 1.0, meter)
        assert one.share(20.0) is not None
        first.process.send_signal(signal.SIGSTOP)
        within(10, lambda: one.share() is None)
        first.process.send_signal(signal.SIGCONT)
        within(10, lambda: mbit(one) == 8)
        first.process.kill()
        within(10, lambda: one.share() is None)
        within(10, lambda: "is away" in one.why_alone)
        assert one.bits_per_second is None
    with CoordinatorProcess("6mbit", address):
        within(10, lambda: mbit(one) == 6)
        assert not one.why_alone
        meter.begin()
        meter.expect(1_000_000, time.monotonic())  # due at once, and never acknowledged
        within(10, lambda: mbit(one) <= 3.2)
        meter.end()
        before = mbit(one)
        within(10, lambda: mbit(one) > before)
    one.close()


def test_a_plan_changes_what_is_counted_on(coordinator: CoordinatorProcess) -> None:
    one = member(coordinator.address)
    share = one.share(20.0)
    assert share is not None
    assert share.mode == POINTS[0].mode
    one.plan(0.05)
    within(5, lambda: (share := one.share()) and share.mode == POINTS[1].mode)
    one.plan(0.001)
    within(5, lambda: (share := one.share()) and share.mode == "")
    one.close()


def test_it_needs_no_model_and_imports_none() -> None:
    """Neither to share out, nor to refuse."""
    words = [sys.executable, "-X", "importtime", *COMMAND[1:], "coordinate", "--uplink", "1mbit", "--json"]
    with (
        subprocess.Popen(
            [*words, "--listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        ) as process,
        ThreadPoolExecutor() as threads,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        imports = threads.submit(process.stderr.read)
        address = json.loads(process.stdout.readline())["address"]
        one = member(address)
        assert one.share(20.0) is not None
        one.close()
        with grpc.insecure_channel(address) as channel:
            (reply,) = coordinate_pb2_grpc.CoordinatorStub(channel).Share(iter([pb.AgentMessage()]), timeout=20)
        assert reply.WhichOneof("part") == "error"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports.result().splitlines()}
    assert {"grpc", "numpy", "kvferry"} <= names
    assert not names & {"torch", "transformers", "PIL"}


JOIN = pb.AgentMessage.Join
POINT = pb.AgentMessage.Point(mode="kv", quality=0.5, bytes=10)
MALFORMED = {
    "nothing": pb.AgentMessage(),
    "a report first": pb.AgentMessage(report=pb.AgentMessage.Report(bytes=1, seconds=1)),
    "no points": pb.AgentMessage(join=JOIN(deadline=1.0)),
    "too many points": pb.AgentMessage(join=JOIN(deadline=1.0, points=[POINT] * 33)),
    "no deadline": pb.AgentMessage(join=JOIN(points=[POINT])),
    "a deadline of no number": pb.AgentMessage(join=JOIN(points=[POINT], deadline=math.nan)),
    "a mode that does not exist": pb.AgentMessage(join=JOIN(points=[pb.AgentMessage.Point(mode="x")], deadline=1)),
    "endless seconds": pb.AgentMessage(
        join=JOIN(points=[pb.AgentMessage.Point(mode="kv", seconds=math.inf)], deadline=1)
    ),
    "local bytes": pb.AgentMessage(join=JOIN(points=[pb.AgentMessage.Point(mode="local", bytes=1)], deadline=1)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_joins_are_told_so(coordinator: CoordinatorProcess, name: str) -> None:
    with grpc.insecure_channel(coordinator.address) as channel:
        replies = list(coordinate_pb2_grpc.CoordinatorStub(channel).Share(iter([MALFORMED[name]]), timeout=20))
    assert [reply.WhichOneof("part") for reply in replies] == ["error"]
    assert replies[0].error.kind in (service_pb2.ERROR_KIND_INPUT, service_pb2.ERROR_KIND_PROTOCOL)
    assert len(replies[0].error.message) > 20


def test_a_malformed_report_ends_one_membership(coordinator: CoordinatorProcess) -> None:
    one = member(coordinator.address)
    assert one.share(20.0) is not None
    wrong = [
        pb.AgentMessage(join=JOIN(points=[POINT], deadline=1)),
        pb.AgentMessage(report=pb.AgentMessage.Report(seconds=math.nan)),
    ]
    with grpc.insecure_channel(coordinator.address) as channel:
        replies = list(coordinate_pb2_grpc.CoordinatorStub(channel).Share(iter(wrong), timeout=20))
    assert replies[-1].error.kind == service_pb2.ERROR_KIND_INPUT
    within(5, lambda: (share := one.share()) and share.members == 1)
    one.close()


def test_a_refusal_is_raised_where_the_share_is_wanted(coordinator: CoordinatorProcess) -> None:
    one = member(coordinator.address, *(OperatingPoint(f"kv:{i}", 0.5, 10) for i in range(40)))
    with pytest.raises(InputError, match="32 points"):
        one.share(20.0)
    one.close()


def test_a_port_that_is_taken(coordinator: CoordinatorProcess) -> None:
    from kvferry.coordinator import coordinate

    with pytest.raises(LinkError, match="taken"):
        coordinate("1mbit", coordinator.address)
    for words in (
        {"uplink": "fast"},
        {"uplink": "1mbit", "method": "fair"},
        {"uplink": "1mbit", "lease_seconds": 0.1},
        {"uplink": "1mbit", "idle_seconds": 0},
    ):
        with pytest.raises(InputError):
            coordinate(listen="127.0.0.1:0", **words)
