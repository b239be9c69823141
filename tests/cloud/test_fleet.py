"""A gateway before replicas, as real processes without Ray: one that is killed costs nobody an answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvferry import VLM, Edge, InputError
from kvferry.security import Credentials
from kvferry.security.tokens import new_token
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.process import ENVIRONMENT

SECRET = "known to gateway and replicas"
QUESTION = "what colour is the circle?"


class Part:
    """A process of ``tests/cloud/fleet.py``."""

    def __init__(self, *words: str, log: Path) -> None:
        command = [sys.executable, "-m", "tests.cloud.fleet", *words]
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=ENVIRONMENT)
        self._address = ""

    @property
    def address(self) -> str:
        if not self._address:
            assert self.process.stdout is not None
            self._address = str(json.loads(self.process.stdout.readline())["address"])
        return self._address

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Fleet:
    gateway: Part
    replicas: list[Part]
    tokens: dict[str, str]

    def edge(self, vlm: VLM | None, name: str = "a") -> Edge:
        return Edge(vlm, self.gateway.address, deadline=100, credentials=Credentials(token=self.tokens[name]))

    def lines(self) -> list[dict[str, object]]:
        """The gateway's access lines."""
        lines = [json.loads(line) for line in self.gateway.log.read_text().splitlines()]
        return [line for line in lines if line["logger"] == "kvferry.access"]


@pytest.fixture(scope="module")
def fleet(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    tokens = {name: new_token(folder / "tokens.toml", name) for name in ("a", "b")}
    replicas = [Part("replica", str(model_folder), SECRET, log=folder / f"replica-{n}.log") for n in range(2)]
    addresses = [replica.address for replica in replicas]
    gateway = Part("gateway", SECRET, str(folder / "tokens.toml"), *addresses, log=folder / "gateway.log")
    yield Fleet(gateway, replicas, tokens)
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(60) == 0
    for part in (gateway, *replicas):
        part.kill()


def test_nobody_but_the_gateway_may_ask_a_replica(fleet: Fleet) -> None:
    with grpc.insecure_channel(fleet.replicas[0].address) as channel:
        for metadata in ((), (("authorization", "Bearer guess"), ("kvferry-owner-bin", b"a/"))):
            with pytest.raises(grpc.RpcError) as ended:
                service_pb2_grpc.FerryStub(channel).Describe(pb.DescribeRequest(), timeout=20, metadata=metadata)
            assert ended.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_session_stays_where_it_is_held(fleet: Fleet, vlm: VLM, picture: Path) -> None:
    """Two edges are spread over two replicas, and each of them sends its picture and its scene once."""
    with fleet.edge(vlm, "a") as one, fleet.edge(vlm, "b") as two:
        assert one.describe()["fingerprint"] == vlm.fingerprint
        for how in ({"mode": "image"}, {"mode": "kv:knorm@0.5|int8", "ship_first": True}):
            first = [edge.ask([picture], QUESTION, **how) for edge in (one, two)]  # type: ignore[arg-type]
            again = [edge.ask([picture], QUESTION, **how) for edge in (one, two)]  # type: ignore[arg-type]
            assert all(answer.bitstream_bytes for answer in first)
            assert [answer.bitstream_bytes for answer in again] == [0, 0]
            assert len({answer.text for answer in first + again}) == 1
            asked = {answer.request_id: answer for answer in first + again}
            where = [str(line["replica"]) for line in fleet.lines() if line["request_id"] in asked]
            assert where[0] == where[2]
            assert where[1] == where[3]
        session = one._line.holdings.session
        handle = one._line.holdings.handle(next(iter(one._line.holdings._handles)))
        two._line.holdings.session = session
        start = pb.AskRequest.Start(mode=pb.MODE_IMAGE, question=QUESTION, max_new_tokens=1, session=session)
        start.items.add(handle=handle)
        for name, kind in (("b", pb.ERROR_KIND_NOT_HELD), ("a", pb.ERROR_KIND_UNSPECIFIED)):
            asked_by = (("authorization", f"Bearer {fleet.tokens[name]}"),)
            with grpc.insecure_channel(fleet.gateway.address) as channel:
                messages = iter([pb.AskRequest(start=start), pb.AskRequest(end=pb.AskRequest.End())])
                stub = service_pb2_grpc.FerryStub(channel)
                reply = list(stub.Ask(messages, timeout=60, metadata=asked_by))[-1]
            assert reply.error.kind == kind


def test_mistakes_come_from_replicas_as_they_are(fleet: Fleet) -> None:
    start = pb.AskRequest.Start(mode=pb.MODE_KV, max_new_tokens=1, fingerprint="another", request_id="foreign")
    with grpc.insecure_channel(fleet.gateway.address) as channel:
        asked_by = (("authorization", f"Bearer {fleet.tokens['a']}"),)
        stub = service_pb2_grpc.FerryStub(channel)
        (reply,) = stub.Ask(iter([pb.AskRequest(start=start)]), timeout=60, metadata=asked_by)
    assert reply.error.kind == pb.ERROR_KIND_FINGERPRINT
    assert [line["outcome"] for line in fleet.lines() if line["request_id"] == "foreign"] == ["fingerprint"]


def test_a_replica_that_is_killed_costs_nobody_an_answer(fleet: Fleet, vlm: VLM, picture: Path) -> None:
    """In the middle of answers that have begun: another one goes on with them, and no token is told twice.

    Comes last: one replica is left.
    """
    how = {"mode": "kv:knorm@0.5|int8", "max_new_tokens": 300}
    with fleet.edge(vlm) as edge:
        expected = edge.ask([picture], QUESTION, **how)  # type: ignore[arg-type]
    speaking = threading.Event()
    told: list[list[int]] = [[] for _ in range(4)]
    found: list[str] = []
    failed: list[BaseException] = []

    def ask(number: int) -> None:
        def hear(token: int, _: str) -> None:
            told[number].append(token)
            if all(len(tokens) > 3 for tokens in told):
                speaking.set()

        try:
            with fleet.edge(vlm, "ab"[number % 2]) as edge:
                found.append(edge.ask([picture], QUESTION, on_token=hear, **how).text)  # type: ignore[arg-type]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert speaking.wait(100)
    fleet.replicas[0].process.kill()
    for thread in threads:
        thread.join(100)
    assert failed == []
    assert found == [expected.text] * 4
    assert [len(tokens) for tokens in told] == [expected.tokens] * 4
    assert all(tokens == told[0] for tokens in told)
    assert "replica replica-0 died; its question goes to another" in fleet.gateway.log.read_text()


@pytest.mark.parametrize("option", [{"http": "127.0.0.1:0"}, {"steady": True}])
def test_what_replicas_do_not_have_is_refused(option: dict[str, Any]) -> None:
    from kvferry.cli.serve import serve

    with pytest.raises(InputError, match="--ray"):
        serve("testbed/edge", listen="127.0.0.1:0", ray="local", **option)
