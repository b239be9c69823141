"""Answers a second of a cloud under many clients, against the same cloud of another revision or with other options.

Clients are real connections that replay one compressed cache (``kv``) or one picture (``image``), ask again as soon as
they are answered, and obey a busy cloud's hints. Every answer is compared with that of the model alone.

    python -m benchmarks.serving                                 # 16 clients, and one: new against --together 1
    python -m benchmarks.serving --old 24747a7                   # against the code of a revision
    python -m benchmarks.serving --clients 200 --seconds 120     # percentiles, hints, and memory
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

from benchmarks.report import where, written
from kvferry.evaluate.sweep import provenance
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc

ROOT = Path(__file__).parents[1]
QUESTION = "what colour is the circle?"
CHUNK = 16 * 1024


@dataclass
class Tally:
    """What clients saw."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    @property
    def errors(self) -> int:
        return sum(count for end, count in self.ends.items() if end not in ("right", "hint obeyed"))

    def __str__(self) -> str:
        def three(values: list[float]) -> str:
            return " / ".join(f"{x:.2f}" for x in np.percentile(values or [np.nan], [50, 95, 99]))

        return f"first token {three(self.first)} s, total {three(self.total)} s (p50 / p95 / p99); {dict(self.ends)}"


def endless(model: str, folder: Path) -> Path:
    """The model's folder, without a token that ends an answer."""
    from kvferry.models.load import find_folder

    shutil.copytree(find_folder(model), folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token_id", None)
    file.write_text(json.dumps(settings))
    return folder


def prepared(
    folder: Path, mode: str, recipe: str, tokens: int, dtype: str, steadily: bool
) -> tuple[list[pb.AskRequest], str]:
    """The messages of a question, and its answer by the model alone."""
    import torch

    import kvferry
    from kvferry.models.steady import steady
    from kvferry.modes import Holdings, Question, parse_mode
    from kvferry.testbed.data import sample
    from kvferry.testbed.questions import MAKERS

    torch.set_num_threads(1)
    vlm = kvferry.load(str(folder), dtype=dtype)
    if steadily:
        steady(vlm.model)
    images = sample("validation", 5, kinds=tuple(MAKERS)).images if vlm.has_vision else []
    chosen = parse_mode(mode, recipe)
    sender = chosen.sender(vlm, Question(images, QUESTION), Holdings(hold=False))  # type: ignore[union-attr]
    start = sender.start()
    start.max_new_tokens = tokens
    sender.prepare()
    data = b"".join(sender.chunks())
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    messages = [
        pb.AskRequest(start=start),
        *(pb.AskRequest(chunk=pb.AskRequest.Chunk(data=chunk)) for chunk in chunks),
        pb.AskRequest(end=pb.AskRequest.End(bytes=len(data))),
    ]
    if mode == "kv":
        return messages, vlm.answer(kvferry.decompress(data), max_new_tokens=tokens)
    return messages, vlm.answer(vlm.prefill(images, QUESTION), max_new_tokens=tokens)


@contextmanager
def serving(source: Path, folder: Path, options: list[str]) -> Iterator[tuple[str, int]]:
    """A cloud of the code in ``source``: its address and process."""
    command = [sys.executable, "-m", "kvferry.cli", "serve", "--json", "--model", str(folder)]
    command += ["--listen", "127.0.0.1:0"]
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "GRPC_VERBOSITY": "NONE", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def resident(pid: int) -> float:
    """MiB of memory of a process."""
    text = Path(f"/proc/{pid}/statm").read_text()
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def ask(stub: service_pb2_grpc.FerryStub, messages: list[pb.AskRequest], answer: str, tally: Tally) -> None:
    """One question until it is answered."""
    began, first = time.perf_counter(), 0.0
    while True:
        end, wait = "no end", 0.0
        try:
            async for reply in stub.Ask(iter(messages), timeout=120):
                part = reply.WhichOneof("part")
                if part == "token":
                    first = first or time.perf_counter() - began
                elif part == "done":
                    end = "right" if reply.done.text == answer else "wrong"
                elif part == "error":
                    end, wait = pb.ErrorKind.Name(reply.error.kind), reply.error.retry_seconds
        except grpc.aio.AioRpcError as error:
            end = error.code().name
        if wait:
            tally.ends["hint obeyed"] += 1
            await asyncio.sleep(wait * (1 + random.random() / 2))
            continue
        tally.ends[end] += 1
        if end == "right":
            tally.first.append(first)
            tally.total.append(time.perf_counter() - began)
        elif end != "wrong":
            await asyncio.sleep(0.1)
        return


async def client(address: str, messages: list[pb.AskRequest], answer: str, until: float, tally: Tally) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = service_pb2_grpc.FerryStub(channel)
        while time.perf_counter() < until:
            await ask(stub, messages, answer, tally)


async def load(
    address: str, pid: int, clients: int, seconds: float, messages: list[pb.AskRequest], answer: str
) -> tuple[float, Tally, list[float]]:
    """Answers a second, what clients saw, and the server's memory, once a second."""
    await client(address, messages, answer, time.perf_counter() + 0.5, Tally())
    tally, began, memory = Tally(), time.perf_counter(), list[float]()
    tasks = [asyncio.create_task(client(address, messages, answer, began + seconds, tally)) for _ in range(clients)]
    while any(not task.done() for task in tasks):
        memory.append(resident(pid))
        await asyncio.wait(tasks, timeout=1.0)
    return tally.ends["right"] / (time.perf_counter() - began), tally, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "testbed" / "cloud"), help="a folder")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mode", default="kv", choices=["kv", "image", "prompt"])
    parser.add_argument("--recipe", default="q2c@0.25|int4")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--clients", type=int, default=0, help="only so many, and only the new cloud")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=2, help="old and new in turn, so often")
    parser.add_argument("--old", default="", help="a git revision; default: this code, one answer at a time")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--steady", action="store_true", help="serve --steady")
    args = parser.parse_args()
    origin = where(provenance()["commit"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = endless(args.model, Path(temporary) / "model")
        messages, answer = prepared(folder, args.mode, args.recipe, args.tokens, args.dtype, args.steady)
        options = ["--dtype", args.dtype]
        new = (ROOT, [*options, *(["--steady"] if args.steady else [])])
        if args.clients:
            with serving(new[0], folder, new[1]) as (address, pid):
                rate, tally, memory = asyncio.run(load(address, pid, args.clients, args.seconds, messages, answer))
            third = len(memory) // 3
            second, last = np.mean(memory[third : 2 * third]), np.mean(memory[2 * third :])
            print(f"{args.clients} clients, {args.seconds:g} s: {rate:.1f} answers/s, {tally.errors} errors; {tally}")
            print(f"memory: second third {second:.0f} MiB, last {last:.0f} MiB ({100 * (last / second - 1):+.1f} %)")
            return
        old = (ROOT, [*options, "--together", "1", "--max-waiting", "32"])
        if args.old:
            old = (Path(temporary) / "old", options)
            add = ["git", "-C", str(ROOT), "worktree", "add", "--detach", "-q", str(old[0]), args.old]
            subprocess.run(add, check=True)
        try:
            rows = list[dict[str, object]]()
            for clients in (1, 16):
                rates: dict[str, list[float]] = {"old": [], "new": []}
                for _ in range(args.rounds):
                    for name, (source, extra) in (("old", old), ("new", new)):
                        with serving(source, folder, extra) as (address, pid):
                            rate, tally, _ = asyncio.run(load(address, pid, clients, args.seconds, messages, answer))
                        rates[name].append(rate)
                        print(f"  {name}, {clients} clients: {rate:.1f} answers/s; {tally}", flush=True)
                rows.append({"clients": clients, "tokens": args.tokens, "mode": args.mode, **rates})
                ratio = sum(rates["new"]) / max(sum(rates["old"]), 1e-9)
                print(f"{clients} clients, {args.tokens} tokens, mode {args.mode}: new / old = {ratio:.2f}", flush=True)
            if args.out is not None:
                command = f"python -m benchmarks.serving --tokens {args.tokens} --rounds {args.rounds}"
                command += f" --seconds {args.seconds:g} --mode {args.mode}"
                written(args.out, {"command": command, **origin, "rows": rows})
        finally:
            if args.old:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(old[0])], check=False)


if __name__ == "__main__":
    main()
