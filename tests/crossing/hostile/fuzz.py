"""``python -m tests.crossing.hostile.fuzz --seconds 60``: a real cloud is told wrong things, at random.

Honest calls of every mode, and those of :mod:`tests.crossing.hostile.attacks`, with fields of their start changed,
their bytes edited or cut, their messages lost, repeated or exchanged. Every call must end in an answer or in an error
by name, none of them the cloud's own fault. Prints how many ended how; 1 where anything was found.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc

import kvferry
from kvferry import VLM
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from kvferry.wire.faults import KINDS
from tests.bitstream import fuzz
from tests.crossing.hostile.attacks import QUESTION, Attacker, messages
from tests.crossing.hostile.sender import ended
from tests.crossing.process import CloudProcess, write_model

Call = list[pb.AskRequest]
SMALL = 100_000
"""Bytes of a call that is worth being sent often."""


def honest(vlm: VLM) -> list[Call]:
    """A call of every kind that a cloud should answer."""
    attacker = Attacker(vlm)
    calls = [attacker.image([attacker.picture])]
    for recipe, tiers in (("full|int4", 1), ("knorm@0.5|int8|zstd", 3), ("knorm@0.8,budget=head|kivi:4", 1)):
        blob = kvferry.compress(vlm.prefill([], QUESTION), recipe, tiers)
        calls.append(attacker.kv(blob, recipe))
    talk = messages(pb.AskRequest.Start(mode=pb.MODE_PROMPT, question=QUESTION, hold=True))
    talk[0].start.conversation.digest = bytes(range(32))
    talk[0].start.conversation.turns.add(text="it is red", question="and the other one?")
    calls += [talk, messages(pb.AskRequest.Start(mode=pb.MODE_PROMPT, question=QUESTION))]
    small = (Attacker.decisions, Attacker.pending, Attacker.empty_layers, Attacker.not_numbers, Attacker.template_ids)
    return calls + [call for call in (build(attacker) for build in small) if sum(x.ByteSize() for x in call) < SMALL]


def changed(call: Call, calls: list[Call], rng: random.Random) -> Call:
    """One to three things are wrong with it."""
    call = [pb.AskRequest.FromString(message.SerializeToString()) for message in call]
    for _ in range(rng.randint(1, 3)):
        where = rng.randrange(len(call))
        message, action = call[where], rng.randrange(8)
        if action < 3 and message.HasField("start"):
            fuzz.change(message.start, rng.choice(calls)[0].start, rng)
        elif action < 5 and message.HasField("chunk"):
            message.chunk.data = fuzz.edit(message.chunk.data, rng)
        elif action == 5:
            call.insert(where, rng.choice(rng.choice(calls)))
        elif action == 6 and len(call) > 1:
            del call[where]
        else:
            other = rng.randrange(len(call))
            call[where], call[other] = call[other], call[where]
    total = sum(len(message.chunk.data) for message in call)
    for message in call:
        if message.HasField("end") and rng.random() < 0.9:
            message.end.bytes = total
    return call


def hostile(vlm: VLM, seed: int) -> Iterator[Call]:
    """Without end."""
    rng, calls = random.Random(seed), honest(vlm)
    while True:
        yield changed(rng.choice(calls), calls, rng)


def fuzzed(address: str, vlm: VLM, seconds: float, seed: int) -> Counter[str]:
    """How calls ended; ``INTERNAL``, gRPC's own errors and ``None`` are none that may be among them."""
    ends: Counter[str] = Counter()
    with grpc.insecure_channel(address) as channel:
        stub, until = service_pb2_grpc.FerryStub(channel), time.monotonic() + seconds
        for call in hostile(vlm, seed):
            ends[ended(stub, call)] += 1
            if time.monotonic() > until:
                return ends
    return ends


def wrong(ends: Counter[str]) -> set[str]:
    """What no call may end in."""
    named = {pb.ErrorKind.Name(number).removeprefix("ERROR_KIND_") for number in KINDS.values()} - {"INTERNAL"}
    return set(ends) - named - {"done"}


def main() -> int:
    """Run for the given time."""
    parser = argparse.ArgumentParser(description="Tell a cloud wrong things.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "cloud")
        with CloudProcess(model, "--max-seconds", "20") as server:
            ends = fuzzed(server.address, kvferry.load(str(model)), given.seconds, given.seed)
            alive = server.process.poll() is None
    for name, count in sorted(ends.items()):
        print(f"{count:9,}  {name}")
    print(f"{ends.total():,} executions in {given.seconds:g} s, {len(wrong(ends))} kinds of wrong ends")
    return 1 if wrong(ends) or not alive else 0


if __name__ == "__main__":
    sys.exit(main())
