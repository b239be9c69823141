"""``python -m tests.crossing.hostile.sender ADDRESS SECONDS CLIENTS < messages``: hostile clients, elsewhere.

A process of its own that gives way to all others, so that what is seen beside it is the cloud's doing. On stdin comes a
call: messages with their sizes before them. On stdout goes how calls ended, as one JSON object.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections import Counter

import grpc

from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc

SIZE = struct.Struct("<I")
PATIENCE = 120.0


def packed(call: list[pb.AskRequest]) -> bytes:
    """What goes to stdin."""
    return b"".join(SIZE.pack(x.ByteSize()) + x.SerializeToString() for x in call)


def unpacked(data: bytes) -> list[pb.AskRequest]:
    """A call back."""
    call, at = [], 0
    while at < len(data):
        (size,) = SIZE.unpack_from(data, at)
        call.append(pb.AskRequest.FromString(data[at + SIZE.size : at + SIZE.size + size]))
        at += SIZE.size + size
    return call


def ended(stub: service_pb2_grpc.FerryStub, call: list[pb.AskRequest]) -> str:
    """How a call ends: ``done``, the kind of the cloud's error, or gRPC's."""
    last = pb.AskReply()
    try:
        for reply in stub.Ask(iter(call), timeout=PATIENCE):
            last = reply
    except grpc.RpcError as error:
        return str(error.code().name)  # type: ignore[attr-defined]
    if last.WhichOneof("part") == "error":
        return pb.ErrorKind.Name(last.error.kind).removeprefix("ERROR_KIND_")
    return str(last.WhichOneof("part"))


def begin(address: str, seconds: float, clients: int, call: list[pb.AskRequest]) -> subprocess.Popen[bytes]:
    """Start it, and wait until it begins."""
    words = [sys.executable, "-m", __name__, address, str(seconds), str(clients)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(packed(call))
    process.stdin.close()
    assert process.stdout is not None
    process.stdout.readline()
    return process


def told(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """How its calls ended."""
    assert process.stdout is not None
    with process:
        ends: dict[str, int] = json.loads(process.stdout.read())
    return ends


def main(address: str, seconds: float, clients: int) -> None:
    """Each client asks again and again."""
    os.nice(19)
    call = unpacked(sys.stdin.buffer.read())
    ends: Counter[str] = Counter()
    print("begun", flush=True)
    until = time.perf_counter() + seconds

    def client() -> None:
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = service_pb2_grpc.FerryStub(channel)
            while True:
                ends[ended(stub, call)] += 1
                if time.perf_counter() > until:
                    return

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(ends))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
