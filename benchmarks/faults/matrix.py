"""Every fault of the wire in every phase of a question: right, a named error, or what must never be."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.relay import FAULTS, BrokenRelay, Plan, Way
from kvferry import VLM, Answer, Edge, KVFerryError

QUESTION = "what colour is the circle?"
DEADLINE = 3.0
LATE = 2.0
"""Seconds past the deadline from which on a question counts as one that hangs; machines are busy."""
TOKENS = 8
MODES = ("image", "prompt", "kv:leaveout@0.5|int4|zstd", "kv:full|bf16", "embeds:int4", "scout:vlcache@0.5", "turns")
"""``turns`` is a conversation: its second question names what the first one left with the cloud."""
PHASES: dict[str, tuple[Way, float, float]] = {
    "connecting": ("up", 0.0, 0.0),
    "opening": ("up", 0.0, 0.15),
    "sending": ("up", 0.15, 0.9),
    "end of sending": ("up", 0.9, 1.0),
    "first replies": ("down", 0.0, 0.5),
    "answer": ("down", 0.5, 0.95),
    "end of the answer": ("down", 0.95, 1.0),
}
"""Where a fault strikes: the direction, and between which shares of the bytes of an unharmed question."""
RIGHT, ERROR, WRONG, HANG, CRASH = "right", "error", "wrong", "hang", "crash"
NEVER = (WRONG, HANG, CRASH)


@dataclass
class Cell:
    """What became of the questions that met one fault in one phase."""

    ends: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One question and its fault."""

    mode: str
    fault: str
    phase: str
    seed: int


class Asker:
    """One edge's place: its relay, and a way to ask a question through it."""

    def __init__(self, target: str, vlm: VLM, picture: Path) -> None:
        self.relay = BrokenRelay(target)
        self.target, self.vlm, self.picture = target, vlm, picture

    def ask(self, mode: str, plan: Plan | None, deadline: float = DEADLINE) -> Answer:
        """A new edge, which meets ``plan`` on the connection that carries its question."""
        self.relay.plan = plan
        pictures = [] if mode == "prompt" else [self.picture]
        with Edge(self.vlm, self.relay.address, deadline=deadline) as edge:
            if mode != "turns":
                return edge.ask(pictures, QUESTION, mode=mode, max_new_tokens=TOKENS)
            talk = edge.conversation(pictures, mode="image")
            talk.ask("is there a square?", max_new_tokens=TOKENS)
            return talk.ask(QUESTION, max_new_tokens=TOKENS)


@dataclass
class Clean:
    """What a mode's question gives and takes without a fault."""

    text: str
    passed: dict[Way, int]


def learn(asker: Asker, modes: Iterable[str]) -> dict[str, Clean]:
    """Ask every mode's question unharmed."""
    known = {}
    for mode in modes:
        answer = asker.ask(mode, None, 60.0)
        known[mode] = Clean(answer.text, dict(asker.relay.passed))
    return known


def cases(n: int, modes: Sequence[str], seed: int = 0, first: int = 0) -> list[Case]:
    """``n`` of them from the ``first`` on; faults and phases take turns: each pair comes as often as any other."""
    pairs = [(fault, phase) for fault in FAULTS for phase in PHASES]
    numbers = range(first, first + n)
    return [Case(modes[i % len(modes)], *pairs[(i // len(modes)) % len(pairs)], seed + i) for i in numbers]


def plan_of(case: Case, clean: Clean) -> Plan:
    way, low, high = PHASES[case.phase]
    at = int(random.Random(case.seed).uniform(low, high) * clean.passed[way])
    return Plan(case.fault, way, at, case.seed)


def run_one(asker: Asker, case: Case, clean: Clean) -> tuple[str, str]:
    """How it ended, and what was said of it."""
    plan, began = plan_of(case, clean), time.monotonic()
    try:
        answer = asker.ask(case.mode, plan)
        end, said = (RIGHT, "") if answer.text == clean.text else (WRONG, f"{answer.text!r} for {clean.text!r}")
    except KVFerryError as error:
        end, said = ERROR, type(error).__name__
    except BaseException as error:  # all that is not one of our errors is a fault of ours
        end, said = CRASH, f"{type(error).__name__}: {error}"
    took, allowed = time.monotonic() - began, DEADLINE * (2 if case.mode == "turns" else 1)  # each of its questions
    return (HANG, f"{took:.1f} s, {end} {said}") if took > allowed + LATE else (end, said)


def run(
    target: str,
    vlm: VLM,
    picture: Path,
    todo: Sequence[Case],
    clean: dict[str, Clean],
    workers: int = 8,
    tick: Callable[[], object] = lambda: None,
) -> dict[tuple[str, str], Cell]:
    """All cases, several at a time; what became of them by fault and phase."""
    found = {(fault, phase): Cell() for fault in FAULTS for phase in PHASES}
    lock, own = threading.Lock(), threading.local()

    def work(case: Case) -> None:
        if not hasattr(own, "asker"):
            own.asker = Asker(target, vlm, picture)
        end, said = run_one(own.asker, case, clean[case.mode])
        with lock:
            cell = found[case.fault, case.phase]
            cell.ends[end] += 1
            if end == ERROR:
                cell.errors[said] += 1
            elif end in NEVER:
                cell.examples.append(f"{end}: {case.mode}, {case.fault}, {case.phase}, seed {case.seed}: {said}")
            tick()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, todo))
    return found
