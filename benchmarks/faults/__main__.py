"""``python -m benchmarks.faults``: faults of the wire, one a question, against a real cloud; see :mod:`.matrix`.

A good client asks the same cloud directly all the while. Its usual time is that beside as many edges without faults.
Exit code 1 where an answer was wrong, a question hung past its deadline, something crashed, or the good client had a
wrong answer or none.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

import kvferry
from benchmarks.faults.matrix import DEADLINE, MODES, NEVER, Asker, Cell, cases, learn, run, table
from kvferry.evaluate.sweep import provenance
from tests.crossing.process import CloudProcess, write_model, write_picture

GAIN = 4.0
"""Weights of the untrained model times this: its answers hang on every word and picture that it reads."""
CLEAN = 0.05
"""Of all questions, those that are asked without a fault first, to see what is usual."""


def memory(pid: int) -> float:
    """Resident MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class GoodClient:
    """The process of :mod:`.good`, and what it has said."""

    def __init__(self, address: str, picture: Path, text: str) -> None:
        command = [sys.executable, "-m", "benchmarks.faults.good", address, str(picture), text]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.asked: list[tuple[float, float, bool]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            at, seconds, right = line.split()
            self.asked.append((float(at), float(seconds), right == "1"))

    def between(self, began: float, ended: float) -> list[float]:
        """Seconds of the questions answered in that time."""
        return [seconds for at, seconds, _ in self.asked if began <= at - seconds and at <= ended]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="faults")
    parser.add_argument("--workers", type=int, default=6, help="edges at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, picture = write_model(folder / "cloud", gain=GAIN), write_picture(folder / "scene.png")
        with CloudProcess(model, "--max-waiting", "64", log=folder / "log") as cloud:
            vlm = kvferry.load(str(model))
            report = _faults(cloud, vlm, picture, given)
            report |= {"ended": cloud.stop()}
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    bad = sum(report["ends"].get(end, 0) for end in NEVER) + report["good"]["wrong"] + report["ended"]
    sys.exit(1 if bad or not report["good"]["alive"] else 0)


def _faults(cloud: CloudProcess, vlm: kvferry.VLM, picture: Path, given: argparse.Namespace) -> dict[str, object]:
    asker = Asker(cloud.address, vlm, picture)
    clean = learn(asker, MODES)
    good = GoodClient(cloud.address, picture, clean["image"].text)
    todo = cases(given.n, MODES, given.seed)
    count = iter(range(1, len(todo) + 1))

    def tick() -> None:
        done = next(count, len(todo))
        if done % 500 == 0:
            print(f"{done:,} of {len(todo):,}", file=sys.stderr, flush=True)

    few = max(given.workers * len(MODES), int(CLEAN * len(todo)))
    began = time.monotonic()
    while not good.asked and good.alive:
        time.sleep(0.1)
    start = time.monotonic()
    _without_faults(cloud.address, vlm, picture, few, given.workers)
    before, middle = memory(cloud.process.pid), time.monotonic()
    found = run(cloud.address, vlm, picture, todo, clean, given.workers, tick)
    ended = time.monotonic()
    asker.ask("image", None, 60.0)
    after, alive = memory(cloud.process.pid), good.alive
    good.end()
    usual, beside = good.between(start, middle), good.between(middle, ended)
    ends = sum((cell.ends for cell in found.values()), Counter())
    errors = sum((cell.errors for cell in found.values()), Counter())
    print(table(found))
    print(f"errors: {', '.join(f'{n:,} {name}' for name, n in errors.most_common())}; deadline {DEADLINE:g} s")
    for each in _examples(found):
        print(each)
    ratio = statistics.median(beside) / statistics.median(usual)
    worst = statistics.quantiles(beside, n=100)[98] / statistics.quantiles(usual, n=100)[98]
    print(
        f"good client: {len(beside):,} questions beside the faults, median {ratio:.2f}x and 99th percentile "
        f"{worst:.2f}x of what they are beside {given.workers} edges without faults (n = {len(usual):,}); "
        f"memory of the cloud {before:.0f} -> {after:.0f} MiB"
    )
    print(f"{provenance(vlm)['commit'][:12]}, {platform.machine()}, {ended - began:.0f} s")
    return {
        "command": f"python -m benchmarks.faults --n {given.n} --workers {given.workers} --seed {given.seed}",
        **{key: provenance(vlm)[key] for key in ("commit", "machine")},
        "ends": dict(ends),
        "errors": dict(errors),
        "cells": {f"{fault} / {phase}": dict(cell.ends) for (fault, phase), cell in found.items()},
        "examples": _examples(found),
        "good": {
            "alive": alive,
            "wrong": sum(not right for _, _, right in good.asked),
            "usual": usual,
            "beside": beside,
            "median_ratio": ratio,
            "p99_ratio": worst,
        },
        "memory_mib": [before, after],
    }


def _without_faults(address: str, vlm: kvferry.VLM, picture: Path, n: int, workers: int) -> None:
    """As many edges as later, with a delay of nothing."""
    from concurrent.futures import ThreadPoolExecutor

    askers = [Asker(address, vlm, picture) for _ in range(workers)]

    def ask(worker: int) -> None:
        for i in range(n // workers):
            askers[worker].ask(MODES[i % len(MODES)], None, 60.0)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(ask, range(workers)))


def _examples(found: dict[tuple[str, str], Cell]) -> list[str]:
    return [each for cell in found.values() for each in cell.examples][:20]


if __name__ == "__main__":
    main()
