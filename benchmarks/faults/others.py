"""Faults that are none of the wire: processes that are killed or frozen, a full disk, and what should not be asked."""

from __future__ import annotations

import os
import random
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from benchmarks.faults.matrix import CRASH, DEADLINE, ERROR, HANG, LATE, QUESTION, RIGHT, TOKENS, WRONG, Cell
from kvferry import VLM, Edge, KVFerryError
from kvferry.files import write_whole
from kvferry.security import Credentials
from kvferry.security.tokens import Token, hash_of
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.hostile.attacks import Attacker
from tests.crossing.process import CloudProcess

NONE = "-"
"""The phase of faults that have none."""
FULL_BYTES = 100
"""Largest file that a cloud on a full disk can write."""
USUAL_SECONDS = 0.3
Call = list[pb.AskRequest]


class Place:
    """A cloud with a store and tokens at one address, which may die and be started again.

    Parameters
    ----------
    text : str
        What it answers to the question about the picture.
    """

    def __init__(self, folder: Path, model: Path, vlm: VLM, picture: Path, text: str) -> None:
        self.token, self.old = f"kvf_{secrets.token_hex(16)}", f"kvf_{secrets.token_hex(16)}"
        past = datetime.now(UTC) - timedelta(days=1)
        tokens = [
            Token("good", ("ask", "describe"), sha256=hash_of(self.token)),
            Token("old", ("ask", "describe"), sha256=hash_of(self.old), expires=past),
        ]
        write_whole(folder / "tokens.toml", "\n\n".join(token.entry() for token in tokens), secret=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        files = "--tokens", str(folder / "tokens.toml"), "--store", str(folder / "store")
        self._options = "--listen", self.address, *files
        self._model, self.picture, self.text = model, picture, text
        self.attacker = Attacker(vlm)
        self.cloud = self.started()

    def started(self) -> CloudProcess:
        """A new cloud, that listens."""
        cloud = CloudProcess(self._model, *self._options)
        assert cloud.address == self.address
        return cloud

    def ask(self, deadline: float = DEADLINE) -> tuple[str, str]:
        """A new edge's question: how it ended, and what was said of it."""
        began = time.monotonic()
        try:
            with Edge(None, self.address, deadline=deadline, credentials=Credentials(token=self.token)) as edge:
                text = edge.ask([self.picture], QUESTION, mode="image", max_new_tokens=TOKENS).text
            end, said = (RIGHT, "") if text == self.text else (WRONG, f"{text!r} for {self.text!r}")
        except KVFerryError as error:
            end, said = ERROR, type(error).__name__
        except BaseException as error:
            end, said = CRASH, f"{type(error).__name__}: {error}"
        took = time.monotonic() - began
        return (HANG, f"{took:.1f} s, {end} {said}") if took > deadline + LATE else (end, said)

    def call(self, **start: object) -> Call:
        """The same question as messages."""
        call = self.attacker.image([self.picture.read_bytes()])
        call[0].start.question, call[0].start.max_new_tokens = QUESTION, TOKENS
        for name, value in start.items():
            setattr(call[0].start, name, value)
        return call

    def said(self, stub: service_pb2_grpc.FerryStub, call: Call, token: str) -> tuple[str, str]:
        """How a call ends: ``done`` with its text, an error by its name, or gRPC's."""
        last = pb.AskReply()
        try:
            for reply in stub.Ask(iter(call), timeout=DEADLINE, metadata=[("authorization", f"Bearer {token}")]):
                last = reply
        except grpc.RpcError as error:
            return str(error.code().name), ""  # type: ignore[attr-defined]
        if last.HasField("error"):
            return pb.ErrorKind.Name(last.error.kind).removeprefix("ERROR_KIND_"), last.error.message
        return str(last.WhichOneof("part")), last.done.text


# what should not be asked: what is sent, by whom, and how it must end

Ask = Callable[[Place, random.Random], tuple[Call, str]]


def expired(place: Place, rng: random.Random) -> tuple[Call, str]:
    return place.call(), place.old


def wrong_model(place: Place, rng: random.Random) -> tuple[Call, str]:
    call = place.attacker.not_numbers()
    call[0].start.fingerprint = rng.randbytes(16).hex()
    return call, place.token


def oversize(place: Place, rng: random.Random) -> tuple[Call, str]:
    """More bytes than were announced, or more announced than are taken."""
    call = place.call()
    if rng.random() < 0.5:
        call[0].start.items[0].size = (1 << 29) + rng.randrange(1 << 40)
    else:
        call.insert(2, pb.AskRequest(chunk=pb.AskRequest.Chunk(data=rng.randbytes(rng.randrange(1, 4096)))))
    return call, place.token


def random_bytes(place: Place, rng: random.Random) -> tuple[Call, str]:
    """A cache of random bytes, some of them behind a right beginning."""
    start = b"KVF\x03" if rng.random() < 0.5 else b""
    return place.attacker.kv(start + rng.randbytes(rng.randrange(1, 3000))), place.token


REFUSED: dict[str, tuple[Ask, tuple[str, ...]]] = {
    "expired token": (expired, ("UNAUTHENTICATED", "PERMISSION_DENIED", "ACCESS")),
    "wrong model": (wrong_model, ("FINGERPRINT",)),
    "oversize": (oversize, ("INPUT", "PROTOCOL")),
    "random bytes": (random_bytes, ("CORRUPT", "TRUNCATED", "VERSION", "INPUT")),
}


def asked_wrongly(place: Place, cells: dict[tuple[str, str], Cell], each: int, seed: int) -> None:
    """So many of each kind, and so many recorded calls that come a second time."""
    with grpc.insecure_channel(place.address) as channel:
        stub = service_pb2_grpc.FerryStub(channel)
        for i in range(each):
            rng = random.Random(f"{seed} {i}")
            for name, (build, allowed) in REFUSED.items():
                call, token = build(place, rng)
                end, text = place.said(stub, call, token)
                bad = WRONG if end == "done" else CRASH if end in ("INTERNAL", "UNKNOWN") else HANG
                note(cells, name, (ERROR if end in allowed else bad), end, f"{end} {text}")
            call = place.call(passage=rng.randbytes(16))
            first, second = (place.said(stub, call, place.token) for _ in range(2))
            right = first == ("done", place.text) and (second[0] == "PROTOCOL" or second == first)
            note(cells, "replay", ERROR if right and second[0] == "PROTOCOL" else RIGHT if right else WRONG, second[0],
                 f"{first}, then {second}")  # fmt: skip


def on_a_full_disk(place: Place, cells: dict[tuple[str, str], Cell], n: int) -> None:
    """Nothing can be stored any more: answers are right all the same."""
    pid = place.cloud.process.pid
    usual = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_BYTES, usual[1]))
    for _ in range(n):
        note(cells, "full disk", *place.ask())
    resource.prlimit(pid, resource.RLIMIT_FSIZE, usual)


@contextmanager
def asking(place: Place, cells: dict[tuple[str, str], Cell], fault: str, workers: int) -> Iterator[None]:
    """Several questions under way while something happens to the cloud."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(place.ask) for _ in range(workers)]
        yield
        for each in waiting:
            note(cells, fault, *each.result())


def frozen(place: Place, cells: dict[tuple[str, str], Cell], rounds: int, workers: int, rng: random.Random) -> None:
    """SIGSTOP at some time in a question, SIGCONT before its deadline or behind it."""
    for _ in range(rounds):
        with asking(place, cells, "server frozen", workers):
            time.sleep(rng.uniform(0, USUAL_SECONDS))
            place.cloud.process.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0.1, 1.2 * DEADLINE))
            place.cloud.process.send_signal(signal.SIGCONT)


def killed(place: Place, cells: dict[tuple[str, str], Cell], rounds: int, workers: int, rng: random.Random) -> None:
    """kill -9 at some time in a question; another cloud takes its place, and knows what was stored."""
    for _ in range(rounds):
        with asking(place, cells, "server killed", workers):
            time.sleep(rng.uniform(0, USUAL_SECONDS))
            place.cloud.process.kill()
            place.cloud.process.wait()
            place.cloud = place.started()
        end, said = place.ask(60.0)
        note(cells, "server back", end if end == RIGHT else CRASH, said, f"after its restart: {end} {said}")


def edges_killed(
    place: Place, cells: dict[tuple[str, str], Cell], address: str, rounds: int, rng: random.Random
) -> None:
    """kill -9 of an edge at some time in its questions: others are answered."""
    for _ in range(rounds):
        command = [sys.executable, "-m", "benchmarks.faults.good", address, str(place.picture), place.text]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as edge:
            assert edge.stdout is not None
            right = edge.stdout.readline().endswith("1\n")
            threading.Event().wait(rng.uniform(0, 2 * USUAL_SECONDS))
            os.kill(edge.pid, signal.SIGKILL)
        end, said = place.ask()
        note(cells, "edge killed", end if right else WRONG, said)


def note(cells: dict[tuple[str, str], Cell], fault: str, end: str, said: str, example: str = "") -> None:
    """One more case."""
    cell = cells.setdefault((fault, NONE), Cell())
    cell.ends[end] += 1
    if end == ERROR:
        cell.errors[said] += 1
    elif end != RIGHT:
        cell.examples.append(f"{end}: {fault}: {example or said}")
