"""Each fault of the wire in each phase of a question: the right answer or a named error, in time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvferry
from benchmarks.faults.__main__ import together
from benchmarks.faults.matrix import (
    MODES,
    NEVER,
    PHASES,
    RIGHT,
    Asker,
    Case,
    Cell,
    cases,
    learn,
    plan_of,
    run,
    run_one,
)  # fmt: skip
from benchmarks.faults.others import REFUSED, Place, asked_wrongly, edges_killed, frozen, killed, on_a_full_disk
from benchmarks.faults.relay import FAULTS
from benchmarks.report import faults
from tests.crossing.process import CloudProcess, write_model, write_picture


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    folder = tmp_path_factory.mktemp("faults")
    model, picture = write_model(folder / "cloud", gain=4.0), write_picture(folder / "scene.png")
    with CloudProcess(model) as cloud:
        yield Asker(cloud.address, kvferry.load(str(model)), picture)
        assert cloud.stop() == 0


def test_the_model_tells_questions_apart(asker: Asker) -> None:
    """Else a wrong question would be answered rightly, and nobody would know."""
    clean = learn(asker, ("image", "prompt", "kv:leaveout@0.5|int4|zstd", "turns"))
    assert len({each.text for each in clean.values()}) == len(clean)


def test_every_fault_in_every_phase(asker: Asker) -> None:
    modes = ("image", "prompt", "kv:leaveout@0.5|int4|zstd")
    clean = learn(asker, modes)
    todo = [case for i, case in enumerate(cases(len(FAULTS) * len(PHASES) * 3, modes)) if i % 3 == i // 3 % 3]
    assert {(case.fault, case.phase) for case in todo} == {(fault, phase) for fault in FAULTS for phase in PHASES}
    found = run(asker.target, asker.vlm, asker.picture, todo, clean, workers=4)
    assert [each for cell in found.values() for each in cell.examples] == []
    assert sum(cell.ends.total() for cell in found.values()) == len(todo)
    assert sum(cell.ends[RIGHT] for (fault, _), cell in found.items() if fault == "delay") > 0


def test_a_flipped_bit_is_never_an_answer(asker: Asker) -> None:
    """In the words of the question and of the answer, which no bitstream's checksum covers."""
    clean = learn(asker, ("prompt",))
    for seed in range(40):
        case = Case("prompt", "flip", ("opening", "sending", "answer", "end of the answer")[seed % 4], seed)
        end, said = run_one(asker, case, clean["prompt"])
        assert end not in NEVER, (plan_of(case, clean["prompt"]), said)


def test_faults_of_processes_and_of_what_is_asked(asker: Asker, tmp_path: Path) -> None:
    """Killed, frozen, on a full disk, and asked what it must refuse: right, or a named error, in time."""
    text = learn(asker, ("image",))["image"].text
    found: dict[tuple[str, str], Cell] = {}
    place = Place(tmp_path, Path(asker.vlm.name), asker.vlm, asker.picture, text)
    try:
        asked_wrongly(place, found, 4, seed=0)
        on_a_full_disk(place, found, 3)
        frozen(place, found, 1, 2, random.Random(0))
        killed(place, found, 1, 2, random.Random(0))
        edges_killed(place, found, asker.target, 1, random.Random(0))
    finally:
        place.cloud.__exit__()
    assert [each for cell in found.values() for each in cell.examples] == []
    ends = {fault: dict(cell.ends) for (fault, _), cell in found.items()}
    assert {fault: ends[fault] for fault in REFUSED} == {fault: {"error": 4} for fault in REFUSED}
    assert ends["full disk"] == {"right": 3}
    assert ends["server back"] == {"right": 1}
    several = "replay", "server frozen", "server killed", "edge killed"
    assert {fault: sum(ends[fault].values()) for fault in several} == {
        "replay": 4, "server frozen": 2, "server killed": 2, "edge killed": 1,
    }  # fmt: skip


def test_reports_add_up(tmp_path: Path) -> None:
    one: dict[str, object] = {
        "command": "c", "commit": "0", "commits": ["0"], "n": 3, "machine": "m", "cores": 2, "load": 1.0, "ended": 0,
        "ends": {"right": 2, "error": 1}, "errors": {"LinkError": 1}, "examples": [], "memory_mib": [1, 2],
        "cells": {"drop / answer": {"right": 1}, "drop / sending": {"right": 1}, "random bytes / -": {"error": 1}},
        "good": {"alive": True, "asked": 4, "wrong": 0, "usual": [1.0, 1.0], "beside": [1.0, 3.0]},
    }  # fmt: skip
    both = together(one, one)
    assert (both["n"], both["good"]["asked"], both["good"]["median_ratio"]) == (6, 8, 2.0)
    said = faults(both)
    assert "**6 faults: 4 right answers, 2 named errors, 0 wrong, 0 hang, 0 crash.**" in said
    assert "| drop | 2 / 0 | 2 / 0 |" in said
    assert "| random bytes | 2 | 0 / 2 |" in said


def test_modes_are_those_that_cross() -> None:
    """Mode translate has the stream of mode kv, and needs two models; tests/translate cuts it."""
    crossing = set(kvferry.modes.MODES) - {"local", "auto", "translate"}
    assert {mode.partition(":")[0] for mode in MODES} - {"turns"} == crossing
