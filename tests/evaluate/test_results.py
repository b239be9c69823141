"""Results of every kind in the report, in files for other tools, and held against each other."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvferry.cli.app import app
from kvferry.errors import InputError
from kvferry.evaluate.compare import compare
from kvferry.evaluate.evaluation import Asked, Reply
from kvferry.evaluate.export import export
from kvferry.evaluate.latex import escape, latex_tables
from kvferry.evaluate.records import Scribe
from kvferry.evaluate.report import render, results_files, sheets
from kvferry.evaluate.results import read_results
from kvferry.statistics import mcnemar, wilcoxon
from tests.analyze.test_analyze import Page
from tests.evaluate.test_tables import lines as swept_lines
from tests.evaluate.test_tables import write as write_sweep

ROWS = {"full|bf16": 9000, "knorm@0.5|int4": 1000, "image:30": 400, "none|bf16": 900, "prompt": 0}
Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A file of an evaluation: ``scores`` by row and question, under protocol A."""

    def file(name: str, scores: dict[str, list[float]], groups: str = "", **changed: Any) -> Path:
        plan = {"model": "me/mine", "task": "own", "recipes": list(scores), "data": "photos/own.jsonl", "split": "",
                "protocols": ["A"], "n": 9, "start": 0, "metric": "exact", "instruction": "", "max_new_tokens": 0,
                "visual": True, "answered": True, **changed.pop("plan", {})}  # fmt: skip
        head = {"evaluation": plan, "command": "kvferry eval me/mine --data 50%_&{x}.jsonl", "commit": "c0ffee" * 5,
                "model": "me/mine", "fingerprint": "abcdef0123456789", "dtype": "bfloat16",
                "architecture": "ItsForConditionalGeneration", "parameters": 2_200_000_000, "torch": "2.13",
                "transformers": "5.23", "machine": "x86_64, 2 cores", "hub": None, **changed}  # fmt: skip
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(head) + "\n")
        n = len(next(iter(scores.values())))
        with Scribe(path) as scribe:
            for i in range(n):
                outcomes = {
                    row: Reply(values[i], ROWS.get(row, 50), 0.1, 0.9, f'said {i}, "{row}"\n')
                    for row, values in scores.items()
                }
                group = groups[i] if groups else ""
                key = f"key {changed.get('key', '')}{i}"
                scribe.write(Asked(i, "A", f"kind {i % 2}", group, 18000, 90, ("yes",), outcomes, "", 89, key))
        return path

    return file


def random_scores(n: int = 40, seed: int = 0) -> dict[str, list[float]]:
    draws = np.random.default_rng(seed)
    rates = {"full|bf16": 0.9, "knorm@0.5|int4": 0.7, "image:30": 0.8, "none|bf16": 0.2}
    return {row: (draws.random(n) < rate).astype(float).tolist() for row, rate in rates.items()}


def test_a_strangers_model_is_nobodys_testbed(write: Write, tmp_path: Path) -> None:
    scores = random_scores()
    path = write("mine", scores)
    (sheet,) = sheets(path)
    assert (sheet.n, sheet.score, sheet.asked, sheet.ships) == (40, "accuracy", "own.jsonl", False)
    by_name = {row.name: row for row in sheet.rows}
    assert {name: row.role for name, row in by_name.items()} == {
        "full|bf16": "ceiling", "none|bf16": "floor", "knorm@0.5|int4": "", "image:30": "",
    }  # fmt: skip
    assert by_name["image:30"].accuracy == pytest.approx(np.mean(scores["image:30"]))
    assert by_name["none|bf16"].against == "lower"
    html = render([sheet])
    page = Page(html)
    assert "own small testbed" not in html
    assert "me/mine (bfloat16, ItsForConditionalGeneration, 2,200 M parameters, fingerprint abcdef012345)" in page.words
    shipped = write_sweep(tmp_path / "shipped.jsonl", swept_lines())
    assert "own small testbed" in render(list(sheets(shipped)))
    assert "own small testbed" not in render([*sheets(shipped), sheet])


def test_figures_of_any_metric_are_shown(write: Write) -> None:
    """Shares, perplexity (lower is better, and its floor is the bare text), and the benchmark of this repository."""
    soft = write("soft", {"full|bf16": [1, 0.6, 0.3], "knorm@0.5|int4": [0.9, 0.6, 0], "none|bf16": [0, 0, 0.1]},
                 plan={"metric": "vqa"})  # fmt: skip
    (sheet,) = sheets(soft)
    assert sheet.rows[0].accuracy == pytest.approx(1.9 / 3)
    nats = {"full|bf16": [2.0, 2.2], "knorm@0.5|int4": [2.1, 2.4], "prompt": [5.0, 5.2]}
    (sheet,) = sheets(write("wiki", nats, plan={"task": "wikitext", "metric": "", "data": ""},
                            hub=["Salesforce/wikitext", None, "test"]))  # fmt: skip
    rows = {row.name: row for row in sheet.rows}
    assert (sheet.score, sheet.asked) == ("perplexity", "wikitext (Salesforce/wikitext, split test)")
    assert rows["full|bf16"].accuracy == pytest.approx(np.exp(2.1))
    assert rows["prompt"].role == "floor"
    assert (rows["prompt"].of_full, rows["prompt"].smaller, rows["prompt"].bytes) == (None, None, 0)
    assert {row.name for row in sheet.rows if row.front} == set(nats)
    assert sheet.most == pytest.approx(np.exp(5.2))
    assert "perplexity" in render([sheet])
    assert latex_tables([sheet]).count(r"\times") == 2
    with pytest.raises(InputError, match="the full cache scores 0 under protocol A"):
        list(sheets(write("zero", {"full|bf16": [0.0, 0.0], "none|bf16": [0.0, 1.0]})))
    for sheet in sheets(ROOT / "study" / "results" / "eval-cloud.jsonl"):
        assert (sheet.score, sheet.split, sheet.ships) == ("accuracy", "validation", True)


def test_questions_on_one_picture_are_drawn_together(write: Write) -> None:
    scores = {"full|bf16": [1.0, 1.0, 0.0, 0.0] * 10, "none|bf16": [0.0] * 40}
    (alone,) = sheets(write("alone", scores))
    (pairs,) = sheets(write("pairs", scores, "".join(chr(65 + i // 2) for i in range(40))))
    width = {x.title: x.rows[0].high - x.rows[0].low for x in (alone, pairs)}
    assert alone.rows[0].accuracy == pairs.rows[0].accuracy == 0.5
    assert width["pairs"] > 1.2 * width["alone"]


def test_one_text_and_a_handful_of_questions_show_nothing(write: Write) -> None:
    """Questions on one text had intervals without a width, and three of them a difference."""
    scores = {"full|bf16": [1.0] * 8, "knorm@0.5|int4": [0.0, 1.0] * 4, "none|bf16": [0.0] * 8}
    (one,) = sheets(write("one", scores, "a" * 8))
    (own,) = sheets(write("own", scores))
    rows = {x.title: next(row for row in x.rows if row.name == "knorm@0.5|int4") for x in (one, own)}
    assert rows["one"].low == rows["own"].low < 0.5 < rows["one"].high == rows["own"].high
    few = {row: values[:3] for row, values in scores.items()}
    (sheet,) = sheets(write("few", few))
    assert {row.against for row in sheet.rows if row.role != "ceiling"} == {"too few questions"}
    run = read_results(write("run", few))
    assert {x.words for x in compare(run, run)["A"]} == {"too few questions"}


def test_long_runs_and_others_are_refused_by_name(write: Write, tmp_path: Path) -> None:
    for name, what in (("drift-cloud", "a long run"), ("scout-edge", "mode scout")):
        with pytest.raises(InputError, match=what):
            read_results(ROOT / "study" / "results" / f"{name}.jsonl")
    for text in ("", "[1]\n", "nonsense\n", '{"a": 1}\n', "3\n"):
        (tmp_path / "odd.jsonl").write_text(text)
        with pytest.raises(InputError, match="holds no results of"):
            read_results(tmp_path / "odd.jsonl")
    (tmp_path / "odd.jsonl").write_bytes(b"\x89PNG\r\n\xff")
    with pytest.raises(InputError, match="holds no results of"):
        read_results(tmp_path / "odd.jsonl")
    with pytest.raises(InputError, match="no results at"):
        read_results(tmp_path / "away.jsonl")
    empty = write("empty", {"full|bf16": []})
    with pytest.raises(InputError, match="no answer yet"):
        read_results(empty)
    assert results_files([tmp_path]) == [empty]


def test_every_answer_in_csv_and_json(write: Write, tmp_path: Path) -> None:
    scores = {"full|bf16": [1.0, 0.5], "none|bf16": [0.0, 0.0]}
    path = write("mine", scores)
    assert export(path, tmp_path / "a.csv") == export(path, tmp_path / "a.json") == 4
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(x["index"], x["row"], x["score"], x["correct"]) for x in table] == [
        ("0", "full|bf16", "1.0", "True"), ("0", "none|bf16", "0.0", "False"), ("1", "full|bf16", "0.5", ""),
        ("1", "none|bf16", "0.0", "False"),
    ]  # fmt: skip
    assert table[0]["said"] == 'said 0, "full|bf16"\n'
    assert (table[0]["model"], table[0]["fingerprint"], table[0]["tokens"]) == ("me/mine", "abcdef0123456789", "90")
    whole = json.loads((tmp_path / "a.json").read_text())
    assert whole["provenance"] == read_results(path).head
    assert [x["score"] for x in whole["answers"]] == [1.0, 0.0, 0.5, 0.0]
    assert whole["tables"][0]["rows"][0]["accuracy"] == 0.75
    swept = write_sweep(tmp_path / "swept.jsonl", swept_lines(n=3))
    assert export(swept, tmp_path / "b.csv") == 12
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is in the extra 'eval'")
    export(path, tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet")["said"].to_pylist() == [x["said"] for x in table]


def test_the_ending_says_what_is_written(write: Write, tmp_path: Path) -> None:
    path = write("mine", random_scores(5))
    for name in ("a.xlsx", "a", "a.txt"):
        with pytest.raises(InputError, match=r"name a file in .parquet, .csv, .json, .tex"):
            export(path, tmp_path / name)
        assert not (tmp_path / name).exists()
    with pytest.raises(InputError, match="choose another place"):
        export(path, tmp_path / "away" / "a.csv")
    done = CliRunner().invoke(app, ["export", str(path), str(tmp_path / "A.CSV")], catch_exceptions=False)
    assert done.exit_code == 0
    assert (tmp_path / "A.CSV").read_text().startswith("index,kind,")


def test_latex_stands_as_it_is(write: Write, tmp_path: Path) -> None:
    export(write("mine", random_scores()), tmp_path / "a.tex")
    text = (tmp_path / "a.tex").read_text()
    for word in ("toprule", "midrule", "bottomrule"):
        assert text.count(rf"\{word}") == 1
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    assert [x.split(" & ")[0] for x in body if x] == [
        r"full\textbar{}bf16 (ceiling)", r"knorm@0.5\textbar{}int4", r"image:30", r"none\textbar{}bf16 (floor)",
    ]  # fmt: skip
    assert all(x.count(" & ") == 4 and x.endswith(r"\\") for x in body if x)
    assert r"50\%\_\&\{x\}.jsonl" in text
    assert not re.search(r"(?<!\\)[%&_#](?![ \\])", text.replace(" & ", "").split("\n", 1)[1])
    assert r"kvferry eval me/mine -{}-data" in text
    assert escape("a\\b~c^d$e") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\$e"


def test_two_runs_are_compared_on_the_same_questions(write: Write, tmp_path: Path) -> None:
    one, two = random_scores(seed=1), random_scores(seed=2)
    two["knorm@0.5|int4"] = [max(a, b) for a, b in zip(one["knorm@0.5|int4"], two["knorm@0.5|int4"], strict=True)]
    a, b = write("a", one), write("b", {row: two[row] for row in ("full|bf16", "knorm@0.5|int4")})
    found = compare(read_results(a), read_results(b))
    assert list(found) == ["A"]
    by_row = {x.row: x for x in found["A"]}
    assert set(by_row) == {"full|bf16", "knorm@0.5|int4"}
    pair = by_row["knorm@0.5|int4"]
    assert pair.difference.mean == pytest.approx(np.mean(two[pair.row]) - np.mean(one[pair.row]))
    assert pair.words == "higher"
    ps = sorted(mcnemar(two[x], one[x]) for x in by_row)
    assert min(x.p for x in found["A"]) == pytest.approx(2 * ps[0])
    (only,) = compare(read_results(a), read_results(a), "none|bf16", "full|bf16")["A"]
    assert only.difference.low > 0
    done = CliRunner().invoke(app, ["compare", str(a), str(b)], catch_exceptions=False)
    assert "no difference shown" in done.stdout or "lower" in done.stdout
    assert "n = 40 questions of both" in done.stdout
    done = CliRunner().invoke(app, ["compare", str(a), str(b), "--row", "full|bf16", "--json"], catch_exceptions=False)
    assert [x["row"] for x in json.loads(done.stdout)["protocols"]["A"]] == ["full|bf16"]


def test_scores_between_right_and_wrong_take_the_ranks(write: Write) -> None:
    one = {"full|bf16": [0.1, 0.5, 0.9, 0.3, 0.2, 0.6]}
    two = {"full|bf16": [0.2, 0.7, 1.0, 0.6, 0.6, 0.6]}
    plan = {"metric": "f1"}
    (pair,) = compare(read_results(write("a", one, plan=plan)), read_results(write("b", two, plan=plan)))["A"]
    assert pair.p == pytest.approx(wilcoxon(two["full|bf16"], one["full|bf16"]))


def test_other_questions_are_not_compared(write: Write, tmp_path: Path) -> None:
    scores = random_scores(6)
    a = read_results(write("a", scores))
    more = random_scores(9)
    assert compare(a, read_results(write("more", more)))["A"][0].one.n == 6
    with pytest.raises(InputError, match=r"question 0 of .* is another one in"):
        compare(a, read_results(write("b", scores, key="x")))
    with pytest.raises(InputError, match="compare runs with one metric"):
        compare(a, read_results(write("c", scores, plan={"metric": "f1"})))
    with pytest.raises(InputError, match="have no row in common"):
        compare(a, read_results(write("d", {"knorm@0.1|int8": [1.0] * 6})))
    with pytest.raises(InputError, match="is another one in"):
        compare(a, read_results(write_sweep(tmp_path / "s.jsonl", swept_lines(n=6))))
    swept = {x: read_results(write_sweep(tmp_path / f"{x}.jsonl", swept_lines(n=6))) for x in ("s", "t")}
    assert compare(swept["s"], swept["t"])
    assert asdict(compare(a, a)["A"][0])["p"] == 1
