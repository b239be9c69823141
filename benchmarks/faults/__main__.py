"""``python -m benchmarks.faults``: faults of the wire, one a question, against a real cloud; see :mod:`.matrix`. Then
processes that are killed or frozen, a full disk, and what should not be asked; see :mod:`.others`.

A good client asks the same cloud directly all the while. Its usual time is that beside as many edges without faults.
With ``--resume`` it goes on from ``--out``: the next cases are asked, and counted together with those before.
Exit code 1 where an answer was wrong, a question hung past its deadline, something crashed, or the good client had a
wrong answer or none.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import kvferry
from benchmarks.faults.matrix import DEADLINE, MODES, NEVER, Asker, Cell, cases, learn, run
from benchmarks.faults.others import Place, asked_wrongly, edges_killed, frozen, killed, on_a_full_disk
from benchmarks.report import faults, where, written
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
    parser.add_argument("--wrongly", type=int, default=100, help="of each kind that should not be asked")
    parser.add_argument("--rounds", type=int, default=4, help="of killing and freezing")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--resume", action="store_true", help="go on from --out")
    given = parser.parse_args()
    if given.resume and given.out is None:
        parser.error("--resume goes on from --out FILE")
    before = json.loads(given.out.read_text()) if given.resume and given.out.exists() else None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, picture = write_model(folder / "cloud", gain=GAIN), write_picture(folder / "scene.png")
        with CloudProcess(model, "--max-waiting", "64", log=folder / "log") as cloud:
            vlm = kvferry.load(str(model))
            report = _faults(cloud, vlm, picture, given, 0 if before is None else before["n"])
            report |= {"ended": cloud.stop()}
    report = report if before is None else together(before, report)
    print(faults(report))
    if given.out is not None:
        written(given.out, report)
    bad = sum(report["ends"].get(end, 0) for end in NEVER) + report["good"]["wrong"] + report["ended"]
    sys.exit(1 if bad or not report["good"]["alive"] else 0)


def together(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Two reports as one; where they come from is what is said of the later one."""
    cells = {name: Counter(ends) for name, ends in before["cells"].items()}
    for name, ends in now["cells"].items():
        cells[name] = cells.get(name, Counter()) + Counter(ends)
    good = {name: before["good"][name] + now["good"][name] for name in ("asked", "wrong", "usual", "beside")}
    return {
        **now,
        "commits": [*before["commits"], *now["commits"]],
        "n": before["n"] + now["n"],
        "ends": dict(Counter(before["ends"]) + Counter(now["ends"])),
        "errors": dict(Counter(before["errors"]) + Counter(now["errors"])),
        "cells": {name: dict(ends) for name, ends in cells.items()},
        "examples": [*before["examples"], *now["examples"]],
        "good": {"alive": now["good"]["alive"], **good, **_ratios(good["usual"], good["beside"])},
        "ended": before["ended"] or now["ended"],
    }


def _ratios(usual: list[float], beside: list[float]) -> dict[str, float]:
    ninety_ninth = [statistics.quantiles(each, n=100)[98] for each in (beside, usual)]
    return {
        "median_ratio": statistics.median(beside) / statistics.median(usual),
        "p99_ratio": ninety_ninth[0] / ninety_ninth[1],
    }


def _others(
    cloud: CloudProcess, vlm: kvferry.VLM, picture: Path, text: str, given: argparse.Namespace, first: int
) -> dict[tuple[str, str], Cell]:
    """Everything but the wire, on a cloud of its own beside the one that the good client asks."""
    found: dict[tuple[str, str], Cell] = {}
    rng = random.Random(given.seed + first)
    place = Place(picture.parent, picture.parent / "cloud", vlm, picture, text)
    try:
        asked_wrongly(place, found, given.wrongly, given.seed + first)
        on_a_full_disk(place, found, given.wrongly)
        frozen(place, found, given.rounds, given.workers, rng)
        killed(place, found, given.rounds, given.workers, rng)
        edges_killed(place, found, cloud.address, given.rounds, rng)
    finally:
        place.cloud.__exit__()
    return found


def _faults(
    cloud: CloudProcess, vlm: kvferry.VLM, picture: Path, given: argparse.Namespace, first: int
) -> dict[str, Any]:
    asker = Asker(cloud.address, vlm, picture)
    clean = learn(asker, MODES)
    good = GoodClient(cloud.address, picture, clean["image"].text)
    todo, origin = cases(given.n, MODES, given.seed, first), where(provenance(vlm)["commit"])
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
    found |= _others(cloud, vlm, picture, clean["image"].text, given, first)
    ended = time.monotonic()
    asker.ask("image", None, 60.0)
    after, alive = memory(cloud.process.pid), good.alive
    good.end()
    usual, beside = good.between(start, middle), good.between(middle, ended)
    ends = sum((cell.ends for cell in found.values()), Counter())
    errors = sum((cell.errors for cell in found.values()), Counter())
    print(f"errors: {', '.join(f'{n:,} {name}' for name, n in errors.most_common())}; deadline {DEADLINE:g} s")
    for each in _examples(found):
        print(each)
    print(f"memory of the cloud {before:.0f} -> {after:.0f} MiB, {ended - began:.0f} s", flush=True)
    command = f"python -m benchmarks.faults --n {given.n} --workers {given.workers} --seed {given.seed}"
    return {
        "command": f"{command} --wrongly {given.wrongly} --rounds {given.rounds}",
        **origin,
        "commits": [origin["commit"]],
        "n": given.n,
        "ends": dict(ends),
        "errors": dict(errors),
        "cells": {f"{fault} / {phase}": dict(cell.ends) for (fault, phase), cell in found.items()},
        "examples": _examples(found),
        "good": {
            "alive": alive,
            "asked": len(good.asked),
            "wrong": sum(not right for _, _, right in good.asked),
            "usual": [round(seconds, 4) for seconds in usual],
            "beside": [round(seconds, 4) for seconds in beside],
            **_ratios(usual, beside),
        },
        "memory_mib": [round(before), round(after)],
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
