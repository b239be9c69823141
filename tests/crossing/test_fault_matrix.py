"""Each fault of the wire in each phase of a question: the right answer or a named error, in time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kvferry
from benchmarks.faults.matrix import MODES, NEVER, PHASES, RIGHT, Asker, Case, cases, learn, plan_of, run, run_one
from benchmarks.faults.relay import FAULTS
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


def test_modes_are_those_that_cross() -> None:
    """Mode translate has the stream of mode kv, and needs two models; tests/translate cuts it."""
    crossing = set(kvferry.modes.MODES) - {"local", "auto", "translate"}
    assert {mode.partition(":")[0] for mode in MODES} - {"turns"} == crossing
