"""Long runs on a few scenes of the validation split: what each study counts, raw files, and their sections."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvferry
from kvferry import VLM, InputError
from kvferry.statistics import Estimate
from kvferry.testbed.data import sample
from kvferry.testbed.questions import MAKERS
from kvferry.testbed.words import RARE_COLOURS, RARE_SHAPES
from study import long_drift, long_pictures, long_rare, long_tables, long_turns
from study.__main__ import app
from study.long_runs import FLOOR, FULL, STUDIES, Plan, Record, answer_ids, read
from study.long_studies import run, studies
from study.page import Places

RECIPES = ("leaveout@0.1|bf16",)
ALL = (FULL, *RECIPES, FLOOR)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return kvferry.load("testbed/cloud")


def plan(study: str, n: int = 2) -> Plan:
    return Plan(study, recipes=RECIPES, n=n)


def test_plans() -> None:
    assert plan("turns").recipes == ALL
    for bad, match in ((lambda: Plan("turn"), "turns, drift"), (lambda: Plan("turns", n=0), "at least one")):
        with pytest.raises(InputError, match=match):
            bad()
    with pytest.raises(kvferry.RecipeError):
        Plan("turns", recipes=("nothing@9",))


def test_ten_different_questions() -> None:
    drawn, questions = long_turns.conversation("validation", 5, 10)
    assert len({question.text for question in questions}) == 10
    assert drawn.scenes == sample("validation", 5, kinds=tuple(MAKERS)).scenes
    assert questions == long_turns.conversation("validation", 5, 10)[1]
    with pytest.raises(InputError, match="different questions"):
        long_turns.conversation("validation", 5, 10_000)


def test_turns(vlm: VLM) -> None:
    """The first turn is an ordinary question, and a later one has the earlier in its context."""
    record = long_turns.run(vlm, plan("turns"), 3)
    _, questions = long_turns.conversation("validation", 3, long_turns.TURNS)
    drawn = sample("validation", 3, kinds=tuple(MAKERS))
    for recipe in ALL:
        assert len(record["turns"][recipe]) == len(record["alone"][recipe]) == long_turns.TURNS
    fresh = [vlm.answer(vlm.prefill(drawn.images, x.text).cache, max_new_tokens=12) == x.answer for x in questions]
    assert record["alone"][FULL] == [int(x) for x in fresh]
    assert record["turns"][FULL][0] == record["alone"][FULL][0]
    assert record["turns"][FULL] != record["alone"][FULL]
    assert record["bytes"][FULL] > record["bytes"][RECIPES[0]]


def test_drift(vlm: VLM) -> None:
    record = long_drift.run(vlm, plan("drift"), 1)
    for text in ("dialogue", "answers", "free"):
        assert record[text][FULL] == [(1.0, 0.0)] * len(long_drift.BUCKETS)
        floor = record[text][FLOOR]
        assert all(0 <= agree <= 1 and kl >= 0 for agree, kl in floor)
        assert min(agree for agree, _ in floor) < 1
    first = record["answers"][RECIPES[0]][0]
    assert first[0] == 1
    assert first[1] < record["answers"][FLOOR][0][1]


def test_pictures(vlm: VLM) -> None:
    record = long_pictures.run(vlm, plan("pictures"), 0)
    question = sample("validation", 0, kinds=("pair",)).question
    assert question.startswith(f"in the {('first', 'second')[record['picture']]} picture")
    for count in (2, 3):
        rows = record[str(count)]
        assert rows[FULL]["kept"] == [1.0] * count
        assert rows[FLOOR]["kept"] == [0.0] * count
        assert (rows[FULL]["agree"], rows[FULL]["kl"]) == (1, 0)
        kept = rows[RECIPES[0]]["kept"]
        assert len(kept) == count
        assert 0 < sum(kept) / count < 0.1
        assert record["bytes"][str(count)][FULL] > 100_000 * count


def test_rare() -> None:
    found = long_rare.indices(plan("rare", 2))
    drawn = [sample("validation", index, kinds=long_rare.KINDS) for index in found]
    seldom = [x for x in drawn if {*RARE_COLOURS, *RARE_SHAPES} & {*x.question.strip("?").split(), *x.answer.split()}]
    assert len(found) == 6
    assert 1 <= len(seldom) <= 2
    kinds = [x.kind for x in drawn]
    assert all(kinds.count(kind) % 3 == 0 for kind in kinds)


def test_counted_scenes() -> None:
    counted = long_rare.frequencies(300)
    assert max(counted["colour"].values()) <= 300
    assert counted["colour"]["pink"] < 15 < counted["colour"]["red"]


def test_raw_files_go_on(tmp_path: Path) -> None:
    out = tmp_path / "rare-cloud.jsonl"
    whole = list(run(plan("rare", 1), out, "python -m study long-runs rare"))
    head, records = read(out)
    assert (head["command"], head["plan"]["study"]) == ("python -m study long-runs rare", "rare")
    assert records == sorted(whole, key=lambda x: x["index"])
    text = out.read_text()
    out.write_text(text[: -len(text.splitlines()[-1]) // 2])
    assert [x["index"] for x in run(plan("rare", 1), out)] == [whole[-1]["index"]]
    assert read(out)[1] == records
    assert list(run(plan("rare", 1), out)) == []
    with pytest.raises(InputError, match="another plan"):
        list(run(plan("turns", 1), out))
    with pytest.raises(InputError, match="python -m study long-runs"):
        read(tmp_path / "none.jsonl")


def made(study: str, records: list[Record], folder: Path) -> str:
    """The section of these records."""
    head = {
        "plan": {"study": study, "recipes": list(ALL), "split": "validation"},
        "command": f"python -m study long-runs {study}", "commit": "0" * 40,
        "torch": "2", "transformers": "5", "machine": "m",
        "model": "testbed/cloud", "fingerprint": "f" * 64, "dtype": "bfloat16",
    }  # fmt: skip
    raw = folder / f"{study}-cloud.jsonl"
    raw.write_text("\n".join(json.dumps(x) for x in (head, *({"index": i, **x} for i, x in enumerate(records)))))
    return long_tables.render(raw, Places(folder / "R.md", folder / "f", folder / "d"), "Title")


def test_sections(tmp_path: Path) -> None:
    """Every study has one, and its figures are those of the records."""
    sizes = dict.fromkeys(ALL, 1000)
    right, wrong = [1] * 10, [1] + [0] * 9
    turns = {"kinds": [], "bytes": sizes, "alone": dict.fromkeys(ALL, right), "turns": dict.fromkeys(ALL, wrong)}
    text = made("turns", [turns] * 4, tmp_path)
    assert "Turns 2 to 10: -100.0 [-100.0, -100.0] points (fewer right)" in text
    assert "n = 4 scenes with 10 questions each, 40 in all" in text
    assert (tmp_path / "d" / "turns-cloud.md").is_file()

    buckets = {FULL: [[1, 0]] * 4, RECIPES[0]: [[0.5, 1]] * 3 + [[0.75, 2]], FLOOR: [[0.5, 1]] * 4}
    text = made("drift", [{"bytes": sizes, **dict.fromkeys(("dialogue", "answers", "free"), buckets)}] * 4, tmp_path)
    assert "25.0 [25.0, 25.0] | agrees more later" in text
    assert "no difference shown" in text

    row = {"right": 1, "agree": 1, "kl": 0.0}
    two = {recipe: {**row, "kept": [0.5, 0.25]} for recipe in ALL}
    three = {recipe: {**row, "kept": [0.5, 0.25, 0.75]} for recipe in ALL}
    record = {"picture": 1, "bytes": {"2": sizes, "3": sizes}, "2": two, "3": three}
    text = made("pictures", [record] * 4, tmp_path)
    assert "25.0 | 50.0 | -25.0 [-25.0, -25.0]" in text
    assert "25.0 | 62.5 | -37.5 [-37.5, -37.5]" in text

    def one(seldom: bool, level: int, alike: int, said: int) -> Record:
        each = {FULL: 1, RECIPES[0]: said, FLOOR: 0}
        return {"kind": "colour", "rare": seldom, "level": level, "alike": alike, "bytes": sizes, "right": each}

    text = made("rare", [one(True, 0, 1, 0), one(False, 2, 2, 1)] * 5, tmp_path)
    assert "rare loses more" in text
    assert "small loses more" in text
    assert "its colour shared loses less" in text


def test_words() -> None:
    assert long_tables.words(Estimate(1, -1, 2, 9)) == "no difference shown"
    assert long_tables.words(Estimate(-2, -3, -1, 9)) == "fewer right"


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"
    done = CliRunner().invoke(app, ["long-runs", "turns", "--n", "1", "--recipe", RECIPES[0], "--out", str(out)])
    assert done.exit_code == 0
    assert f"wrote {out}: 1 new records of 1" in done.output
    assert read(out)[0]["plan"]["recipes"] == list(ALL)


def test_tokens_of_an_answer(vlm: VLM) -> None:
    assert vlm.tokenizer.decode(answer_ids(vlm, "red circle")) == "red circle"
    assert set(STUDIES) == set(studies()) == {*long_tables.SECTIONS, "prune"}
