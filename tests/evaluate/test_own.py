"""Questions of one's own through the commands: what counts, what stands beside it, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import kvferry
from kvferry.cli import main
from kvferry.errors import InputError
from kvferry.evaluate.evaluation import read, run
from kvferry.evaluate.plan import Evaluation
from kvferry.evaluate.results import as_lines
from kvferry.evaluate.tasks.own import OWN
from kvferry.models import load
from kvferry.overlay import jpeg_bytes
from kvferry.pictures import open_picture
from tests.evaluate.own import own_rows, write_rows, write_small_model

LONGEST = "4"
HUB = "owner/model"
"""Might be on the Hub: nobody looks before the rest is right."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def rows(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("own")
    return folder, own_rows(model, folder)


@pytest.fixture
def data(rows: tuple[Path, list[dict[str, Any]]]) -> Path:
    return write_rows(rows[0] / "own.jsonl", rows[1])


class Ran:
    """A command's streams and how it ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["kvferry", *map(str, words)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err


@pytest.fixture
def kv(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(capsys, monkeypatch)


def test_one_command_makes_a_table(kv: Ran, model: Path, data: Path, tmp_path: Path) -> None:
    """Ceiling, floor, recipes, the pictures as JPEG and their embeddings beside them, on the same questions."""
    out = tmp_path / "own.jsonl"
    line = ["sweep", model, "--data", data, "--recipe", "knorm@0.5|int4", "--jpeg", "90,20", "--embeds", "int8"]
    line += ["--max-new-tokens", LONGEST, "--out", out]
    code, said, err = kv(*line, "--json")
    assert code == 0, err
    tables = json.loads(said)
    sent = ["image:90", "image:20", "embeds:int8"]
    assert [x["name"] for x in tables["A"]] == ["full|bf16", "knorm@0.5|int4", *sent, "none|bf16"]
    assert [x["name"] for x in tables["B"]] == ["full|bf16", "knorm@0.5|int4", "none|bf16"]
    assert [tables[p][0]["score"]["mean"] for p in "AB"] == [1, 1]
    assert {x["score"]["n"] for p in "AB" for x in tables[p]} == {4}
    head, lines = read(out)
    assert (head["evaluation"]["n"], head["command"][:13]) == (4, "kvferry sweep")
    pictures = [open_picture(data.parent / f"{i // 2}.png") for i in range(4)]
    by_index = [next(x for x in lines if (x.index, x.protocol) == (i, "A")) for i in range(4)]
    assert [x.outcomes["image:20"].bytes for x in by_index] == [len(jpeg_bytes(x, 20)) for x in pictures]
    assert [x.kind for x in by_index] == ["kind 0", "kind 1"] * 2
    assert by_index[0].group == by_index[1].group != by_index[2].group == by_index[3].group
    vlm = load(model)
    prefilled = vlm.prefill([data.parent / "0.png"], "what is red ?", recipe="knorm@0.5|int4")
    assert by_index[0].outcomes["knorm@0.5|int4"].bytes == len(kvferry.compress(prefilled, "knorm@0.5|int4"))
    code, said, err = kv(*line)
    assert code == 0, err
    assert (code, out.read_text().count("\n")) == (0, 9)
    assert "Answers are judged by `exact`, of at most 4 tokens." in said
    assert "draw the 2 pictures" in said.replace("\n", " ")


def test_words_below_the_question_and_another_metric(model: Path, data: Path, tmp_path: Path) -> None:
    """The instruction is read by the model; a contained answer counts where exact match says no."""
    rows = [json.loads(x) for x in data.read_text().splitlines()]
    vlm = load(model)
    told = f"{rows[0]['question']}\nis it red ?"
    full = vlm.prefill([data.parent / "0.png"], told).cache
    said = vlm.answer(full, max_new_tokens=6)
    rows[0]["answers"] = said.split()[-1:]
    file = write_rows(data.parent / "told.jsonl", rows[:1])
    plan = Evaluation(str(model), OWN, (), ("A",), str(file), metric="contains", instruction="is it red ?",
                      max_new_tokens=6)  # fmt: skip
    (line,) = run(plan, tmp_path / "a.jsonl")
    assert (line.outcomes["full|bf16"].said, line.outcomes["full|bf16"].score) == (said, 1)
    (exact,) = run(Evaluation(str(model), OWN, (), ("A",), str(file), max_new_tokens=6), tmp_path / "b.jsonl")
    assert exact.outcomes["full|bf16"].score == 0


def test_without_answers_the_full_caches_own_counts(kv: Ran, model: Path, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(x) for x in data.read_text().splitlines()]
    file = write_rows(data.parent / "bare.jsonl", [{k: x[k] for k in ("image", "question")} for x in rows])
    out = tmp_path / "x.jsonl"
    code, said, err = kv("eval", "--model", model, "--data", file, "--recipe", "knorm@0.2|int2", "--protocol", "A",
                         "--max-new-tokens", LONGEST, "--out", out)  # fmt: skip
    assert code == 0, err
    assert "the full cache's own, so its score is 1" in said.replace("\n", " ")
    _, lines = read(out)
    for x in lines:
        assert x.references == (x.outcomes["full|bf16"].said,)
        assert x.outcomes["full|bf16"].score == 1
        kept = x.outcomes["knorm@0.2|int2"]
        assert kept.score == float(kept.said == x.references[0])


def test_nothing_right_is_an_error_and_no_table(kv: Ran, model: Path, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(x) | {"answers": ["never said"]} for x in data.read_text().splitlines()]
    said = [json.loads(x)["answers"][0] for x in data.read_text().splitlines()]
    file = write_rows(data.parent / "wrong.jsonl", rows)
    line = ["eval", model, "--data", file, "--protocol", "A", "--max-new-tokens", LONGEST]
    line += ["--out", tmp_path / "x.jsonl"]
    for more in ([], ["--json"]):
        code, out, err = kv(*line, *more)
        assert code == 2
        if more:
            err = json.loads(out)["error"]["message"]
        else:
            assert out == ""
        assert "answers none of 4 questions rightly (protocol A)" in err
        for text in said[:3]:
            assert f"{' '.join(text.split())!r} (right: 'never said')" in err
        for advice in ("--instruction", "--metric", "--max-new-tokens"):
            assert advice in err
    line = ["sweep", model, "--recipe", "full|bf16", "--protocol", "A", "--n", "1", "--split", "validation"]
    code, out, err = kv(*line, "--processes", "1", "--out", tmp_path / "y.jsonl")
    assert (code, out) == (2, "")
    assert "does not answer the only question rightly" in err
    assert "(right: " in err
    code, out, err = kv("tune", model, "--data", file, "--max-new-tokens", "2", "--recipe", "full|int8", "--folder",
                        tmp_path)  # fmt: skip
    assert (code, out) == (2, "")
    assert "answers none of 4 questions" in err


def test_a_changed_file_is_not_continued(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"
    rows = [json.loads(x) for x in data.read_text().splitlines()]
    file = write_rows(tmp_path / "c.jsonl", rows[:2])
    plan = {"model": str(model), "task": OWN, "protocols": ("A",), "images": str(data.parent), "max_new_tokens": 4}
    assert len(list(run(Evaluation(**plan, data=str(file)), out))) == 2
    write_rows(file, rows)
    assert [x.index for x in run(Evaluation(**plan, data=str(file)), out)] == [2, 3]
    write_rows(file, [rows[1], *rows[1:]])
    with pytest.raises(InputError, match=r"c.jsonl, line 1 is no longer what"):
        list(run(Evaluation(**plan, data=str(file)), out))
    with pytest.raises(InputError, match="another evaluation"):
        list(run(Evaluation(**plan | {"max_new_tokens": 3}, data=str(file)), out))


def test_tune_searches_on_them(kv: Ran, model: Path, data: Path, tmp_path: Path) -> None:
    line = ["tune", model, "--data", data, "--max-new-tokens", LONGEST, "--folder", tmp_path, "--recipe", "full|int8"]
    code, out, err = kv(*line, "--recipe", "knorm@0.02|int1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {x["recipe"] for x in found["standings"]} == {"full|int8", "knorm@0.02|int1"}
    assert {x["n"] for x in found["standings"]} == {4}
    assert (found["data"], found["winner"]) == (str(data), None)
    code, out, _ = kv(*line)
    assert "4 questions cannot show it, 100 might" in out
    (raw, *_) = sorted(tmp_path.rglob("round-1-*.jsonl"))
    assert "none|bf16" in read(raw)[1][0].outcomes


def test_lines_of_an_evaluation_are_those_of_a_sweep(model: Path, data: Path, tmp_path: Path) -> None:
    plan = Evaluation(str(model), OWN, ("knorm@0.5|int4",), ("A",), str(data), n=2, max_new_tokens=4)
    asked = list(run(plan, tmp_path / "x.jsonl"))
    from kvferry.evaluate.plan import planned_task

    for line, x in zip(as_lines(planned_task(vars(plan)), asked), asked, strict=True):
        assert (line.index, line.kind, line.group, line.bf16_bytes) == (x.index, x.kind, x.group, x.bf16_bytes)
        assert {k: (o.correct, o.bytes) for k, o in line.outcomes.items()} == {
            k: (o.score, o.bytes) for k, o in x.outcomes.items()
        }


@pytest.mark.parametrize(
    ("rows", "options", "what"),
    [
        ([{"answer": "a"}, {}], (), 'line 2 has no "answer" and own.jsonl, line 1 has one'),
        ([{}, {"image": None}], (), 'line 2 has no "image"'),
        ([{"image": None}], (), 'no picture and no "context"'),
        ([{"answer": "red"}], ("--metric", "yes_no"), "line 1: 'red' is neither yes nor no"),
        ([{"answer": "red"}], ("--metric", "bleu"), "no metric 'bleu'; choose one of exact"),
        ([{"answer": "red"}], ("--jpeg", "many"), "list of qualities"),
        ([{"answer": "red"}], ("--jpeg", "0"), "from 1 to 100"),
        ([{"answer": "red"}], ("--embeds", "int99"), "int99"),
        ([{"answer": "red"}], ("--start", "1"), "no row 1"),
        ([{"answer": "red"}], ("--split", "test"), "--split is for benchmarks"),
    ],
)
def test_mistakes_are_found_before_the_model_is(
    kv: Ran, tmp_path: Path, rows: list[dict[str, Any]], options: tuple[str, ...], what: str
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    file = write_rows(tmp_path / "own.jsonl", [{"image": "a.png", "question": "what?"} | x for x in rows])
    code, out, err = kv("eval", HUB, "--data", file, *options)
    assert (code, out) == (2, "")
    assert what in err


def test_options_of_ones_own_questions_need_them(kv: Ran) -> None:
    for command in ("sweep", "tune", "analyze", "diagnose", "calibrate"):
        code, _, err = kv(command, HUB, "--instruction", "Be brief.")
        assert code == 2
        assert "--data" in err
    for words in (["eval", HUB], ["eval", HUB, "--task", "textvqa", "--metric", "f1"]):
        code, _, err = kv(*words)
        assert code == 2
        assert "--data" in err


def test_a_picture_that_is_missing_is_found_before_a_model_is_loaded(kv: Ran, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "own.jsonl", [{"image": "away.png", "question": "what?", "answer": "x"}])
    for command in ("sweep", "eval", "tune", "calibrate", "profile", "analyze", "diagnose"):
        model = ["--edge", HUB] if command == "profile" else [HUB]
        code, out, err = kv(command, *model, "--data", file)
        assert (code, out) == (2, ""), command
        assert "own.jsonl, line 1: there is no picture at" in err, command
