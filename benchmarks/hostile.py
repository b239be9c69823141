"""``python -m benchmarks.hostile``: what one hostile client does to a real cloud, and to a good client beside it.

Every kind of :mod:`tests.crossing.hostile.attacks` is sent by two clients at once, again and again for some seconds,
while a good client asks. Printed are the good client's usual time, its mean and its longest beside the attack, how
much the server's memory grew at its peak and when all was over, and what the attacker was told. ``--source`` serves
another checkout's code, to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc

import kvferry
from benchmarks.report import where, written
from kvferry.evaluate.sweep import provenance
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.hostile.attacks import KINDS, Attacker
from tests.crossing.hostile.sender import begin, ended, told
from tests.crossing.process import write_model

SECONDS, CLIENTS = 3.0, 2
Call = list[pb.AskRequest]


def memory(pid: int, name: str) -> float:
    """MiB of ``VmRSS`` or ``VmHWM``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def timed(stub: service_pb2_grpc.FerryStub, call: Call, refused: list[str]) -> float:
    """Seconds of an honest call; how it ended, if not with an answer, goes to ``refused``."""
    began = time.perf_counter()
    if (end := ended(stub, call)) != "done":
        refused.append(end)
    return time.perf_counter() - began


def row(name: str, pid: int, address: str, attack: Call, good: Call) -> dict[str, object]:
    """One kind."""
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.FerryStub(channel)
        refused: list[str] = []
        for _ in range(3):
            timed(stub, good, refused)
        usual = statistics.median(timed(stub, good, refused) for _ in range(9))
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        before = memory(pid, "VmRSS")
        attacker = begin(address, SECONDS, CLIENTS, attack)
        waits = [timed(stub, good, refused)]
        while attacker.poll() is None:
            waits.append(timed(stub, good, refused))
        peak = memory(pid, "VmHWM") - before
        timed(stub, good, refused)
        kept = memory(pid, "VmRSS") - before
    return {
        "kind": name,
        "bytes": sum(message.ByteSize() for message in attack),
        "usual_s": round(usual, 4),
        "mean_s": round(statistics.mean(waits), 4),
        "longest_s": round(max(waits), 3),
        "ratio": round(statistics.mean(waits) / usual, 2),
        "peak_mib": round(peak),
        "kept_mib": round(kept),
        "before_mib": round(before),
        "refused": len(refused),
        "told": told(attacker),
    }


class Server:
    """A real cloud; a new one takes its place where an attack left something behind."""

    def __init__(self, model: Path, source: str) -> None:
        words = [sys.executable, "-m", "kvferry.cli", "serve", "--model", str(model), "--listen", "127.0.0.1:0"]
        environment = os.environ | {"PYTHONPATH": source, "GRPC_VERBOSITY": "NONE", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [*words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert self._process.stdout is not None
        self.address = str(json.loads(self._process.stdout.readline())["address"])
        self.pid = self._process.pid

    def end(self) -> None:
        """Whatever it is at."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Print one JSON object a line, then a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default=str(Path(kvferry.__file__).parents[1]), help="folder with kvferry to serve")
    parser.add_argument("--kinds", default="", help="only kinds that contain this")
    parser.add_argument("--out", type=Path, help="JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "cloud")
        vlm = kvferry.load(str(model))
        attacker, origin = Attacker(vlm), where(provenance(vlm)["commit"])
        good = attacker.image([attacker.picture])
        good[0].start.max_new_tokens = 8
        rows: list[dict[str, object]] = []
        server: Server | None = None
        for name in [name for name in KINDS if given.kinds in name]:
            attack = KINDS[name][0](attacker)
            server = server or Server(model, given.source)
            rows.append(row(name, server.pid, server.address, attack, good))
            print(json.dumps(rows[-1]), flush=True)
            if rows[-1]["longest_s"] > 5 or rows[-1]["kept_mib"] > 100:  # type: ignore[operator]
                server.end()
                server = None
        if server is not None:
            server.end()
    if given.out is not None:
        written(given.out, {"command": "python -m benchmarks.hostile", **origin, "rows": rows})
    print("\n| kind | bytes | others' time (x usual) | longest | peak | kept | told |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for each in rows:
        print(
            "| {kind} | {bytes:,} | {ratio} | {longest_s} s | {peak_mib:,} MiB | {kept_mib:,} MiB | {} |".format(
                ", ".join(each["told"]),  # type: ignore[arg-type,call-overload]
                **each,
            )
        )


if __name__ == "__main__":
    main()
