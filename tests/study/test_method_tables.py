"""Methods compared, from small made-up raw results: who counts as what, what decides, and the page it ends on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kvferry.errors import InputError
from kvferry.evaluate.records import Line, Protocol
from kvferry.evaluate.sweep import grid
from kvferry.selection import SCORERS
from kvferry.statistics import Estimate
from study.__main__ import app
from study.bytes_needed import bytes_needed
from study.method_figures import LINES, by_need, drawn, finding, scorer
from study.method_tables import (
    additions,
    additions_note,
    deciding_table,
    fraction_table,
    needed_table,
    render,
    verdict,
)
from study.methods import Methods, methods_of
from study.page import Places
from tests.evaluate.test_tables import write
from tests.study.test_codec_tables import lines as codec_lines
from tests.study.test_codec_tables import report

ROWS = {
    "full|bf16": (1600, 100),
    "none|bf16": (50, 20),
    "q2c@0.25|bf16 proxy": (400, 99),
    "q2c@0.1|bf16 proxy": (160, 60),
    "q2c@0.25|bf16 oracle": (400, 100),
    "q2c@0.1|bf16 oracle": (160, 99),
    "knorm@0.25|bf16": (400, 96),
    "knorm@0.1|bf16": (160, 40),
    "leaveout@0.25|bf16": (400, 100),
    "leaveout@0.1|bf16": (160, 98),
    "q2c@0.25,budget=sparsity|bf16 proxy": (400, 90),
    "q2c@0.1,budget=sparsity|bf16 proxy": (160, 50),
    "knorm@0.25,modality=adaptive|bf16": (400, 97),
    "knorm@0.1,modality=adaptive|bf16": (160, 40),
}
"""Row -> (bytes, right answers of 100)."""


def lines(protocol: Protocol = "B", n: int = 100) -> list[Line]:
    return [
        Line(
            index=i, kind="digit" if i % 2 else "colour", protocol=protocol, bf16_bytes=2000, image_bytes=500,
            tokens=100, outcomes={row: (int(i * 37 % 100 < right), size) for row, (size, right) in ROWS.items()},
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> Methods:
    return Methods(lines(), "B")


def test_rows_are_grouped_into_methods_by_falling_fraction() -> None:
    found = {m.name: m for m in methods_of(list(ROWS))}
    assert len(found) == 6
    assert found["q2c (proxy)"].fractions == (0.25, 0.1)
    assert found["q2c (proxy)"].rows[1] == "q2c@0.1|bf16 proxy"
    assert not found["q2c (oracle)"].deployable


def test_a_profile_in_a_recipe_is_no_fraction() -> None:
    (method,) = methods_of([f"q2c@{x},modality=skip_visual@2024/a.json|bf16" for x in (0.5, 0.1)])
    assert method.base == "q2c,modality=skip_visual@2024/a.json"
    assert method.fractions == (0.5, 0.1)
    assert method.plain == "q2c"


def test_what_a_method_reads_decides_its_sort() -> None:
    aware = {m.base for m in methods_of([f"{s}@0.5|bf16" for s in SCORERS if s not in ("full", "none")]) if m.aware}
    assert aware == {"vlcache"}
    with_more = ["knorm@0.5,budget=sparsity|bf16", "knorm@0.5,modality=text_preserving|bf16"]
    assert all(m.aware for m in methods_of(with_more))
    assert not any(m.aware for m in methods_of(["q2c@0.5|bf16 proxy", "snapkv@0.5,budget=pyramid|bf16"]))


def test_needed_is_that_of_the_plain_function(answers: Methods) -> None:
    method = answers.methods[0]
    plain = bytes_needed(
        [answers.bytes[r] for r in method.rows],
        [answers.correct[answers.names.index(r)] for r in method.rows],
        answers.bytes[answers.full],
        answers.correct[answers.names.index(answers.full)],
        0.98,
    )
    assert answers.estimate(answers.needed(method, 0.98)) == plain


def test_the_best_are_deployable_and_chosen_anew_in_every_draw(answers: Methods) -> None:
    aware, agnostic = answers.best(True, 0.95), answers.best(False, 0.95)
    assert aware is not None
    assert agnostic is not None
    assert (aware[0].name, agnostic[0].name) == ("knorm,modality=adaptive", "leaveout")
    for method in answers.methods:
        if method.deployable:
            reference = aware if method.aware else agnostic
            assert (reference[1] <= answers.needed(method, 0.95)).all()
    published = answers.best(False, 0.95, published=True)
    assert published is not None
    assert published[0].name == "q2c (proxy)"


def test_the_deciding_table(answers: Methods) -> None:
    table = deciding_table(answers).splitlines()
    assert len(table) == 2 + 4
    assert "| 98% | `knorm,modality=adaptive` | " in table[2]
    assert "`leaveout`" in table[2]
    assert table[2].endswith("aware: more bytes |")
    assert "95%, published scorers" in table[5]
    ratio = float(table[2].split(" | ")[-2].split(" ")[0])
    sizes = [float(x.replace(",", "")) for x in re.findall(r"\| ([0-9,]+) \[", table[2])]
    assert ratio == pytest.approx(sizes[0] / sizes[1], abs=0.006)


def test_without_two_sorts_nothing_is_decided() -> None:
    only = [replace(x, outcomes={k: v for k, v in x.outcomes.items() if "=" not in k}) for x in lines()]
    assert "one sort" in deciding_table(Methods(only, "B"))


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.5, 0.9, "fewer bytes"), (0.5, 1.2, "no difference shown"), (1.01, 1.2, "more bytes"),
     (1.0001, 1.002, "no difference shown")],
)  # fmt: skip
def test_verdicts(low: float, high: float, says: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, 100)) == says


def test_a_budget_is_held_against_the_same_scorer_scored_alike(answers: Methods) -> None:
    found = {m.name: (plain.name, ratios) for m, plain, ratios in additions(answers)}
    assert {k: v[0] for k, v in found.items()} == {
        "q2c,budget=sparsity (proxy)": "q2c (proxy)",
        "knorm,modality=adaptive": "knorm",
    }
    assert found["q2c,budget=sparsity (proxy)"][1][0].low > 1
    note = "\n".join(additions_note(answers))
    assert "`budget=sparsity`, added to 1 scorers: fewer bytes with 0, no difference shown with 0, more" in note


def test_where_a_kind_breaks(answers: Methods, tmp_path: Path) -> None:
    places = Places(tmp_path / "RESULTS.md", tmp_path / "figures", tmp_path / "results")
    raw = write(tmp_path / "scorers-x.jsonl", lines())
    render(raw, places, "Title")
    page = places.detail(raw).read_text()
    assert "| method | colour (50) | digit (50) |" in page
    holds, accuracy = (part.splitlines() for part in page.split("by kind of question\n")[1:])
    (row,) = (x for x in holds if x.startswith("| `leaveout`"))
    assert row == "| `leaveout` | 10% | 10% |"
    (row,) = (x for x in accuracy if x.startswith("| `knorm` "))
    colour = np.mean([i * 37 % 100 < 40 for i in range(0, 100, 2)])
    assert row.startswith(f"| `knorm` | {colour:.2f} |")


def test_tables_are_whole(answers: Methods) -> None:
    for text in (fraction_table(answers, answers.methods), needed_table(answers), deciding_table(answers)):
        table = text.splitlines()
        assert len({line.count("|") for line in table}) == 1
    table = fraction_table(answers, answers.methods).splitlines()
    assert "ceiling" in table[2]
    assert "floor" in table[-1]
    assert needed_table(answers).splitlines()[2].startswith("| `leaveout` | agnostic |")


def test_a_panel_holds_at_most_seven_lines_each_scorers_best(answers: Methods) -> None:
    shown = drawn(answers)
    assert len(shown) == len({m.name for m in shown}) <= LINES
    need = {m.name: float(answers.needed(m, 0.98)[0]) for m in answers.methods}
    best = {scorer(m): min(need[x.name] for x in answers.methods if scorer(x) == scorer(m) and x.deployable)
            for m in shown if m.deployable and scorer(m) != "random"}  # fmt: skip
    assert all(any(need[m.name] == least for m in shown if scorer(m) == name) for name, least in best.items())
    assert [m.deployable for m in shown].count(False) == any(not m.deployable for m in answers.methods)


def test_the_title_is_the_finding(answers: Methods) -> None:
    least, *_ = by_need(answers)
    assert finding("B", answers).startswith(f"Protocol B: {least.name} holds 98% of full in ")


def test_questions_that_some_row_lacks_do_not_count() -> None:
    records = lines()
    records[3] = replace(records[3], outcomes={"full|bf16": (1, 1600)})
    assert len(Methods(records, "B").lines) == 99


def test_a_table_needs_its_ceiling() -> None:
    with pytest.raises(InputError, match="ceiling"):
        Methods([Line(0, "k", "A", 1, 1, 1, {"q2c@0.5|int8": (1, 1)})], "A")


def test_the_page_comes_out_the_same_twice(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw / "scorers-x.jsonl", lines("A") + lines("B"))
    built = write(raw / "construction-x.jsonl", lines("A"))
    head, *others = built.read_text().splitlines()
    told = json.loads(head)
    told["sweep"]["apply"] = "construction"
    built.write_text("\n".join([json.dumps(told), *others]) + "\n")
    for kind in ("codecs", "headline"):
        write(raw / f"{kind}-x.jsonl", codec_lines("A") + codec_lines("B"))
    (raw / "tune-x-A.json").write_text(json.dumps(report("full|int4")))
    out = tmp_path / "RESULTS.md"
    words = [
        "results", "--raw", str(raw), "--out", str(out), "--figures", str(tmp_path / "docs" / "figures"), "--details",
        str(tmp_path / "docs" / "results"),
    ]  # fmt: skip
    made = []
    for _ in range(2):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        made.append({p: p.read_bytes() for p in tmp_path.rglob("*") if p.suffix in (".md", ".png")})
    assert made[0] == made[1]
    assert {p.name for p in made[0]} == {
        "RESULTS.md", "scorers-x.png", "scorers-x.md", "construction-x.png", "construction-x.md", "codecs-x.png",
        "codecs-x.md", "headline-x.md", "claims.md",
    }  # fmt: skip
    page = out.read_text()
    order = ["protocol A (ask, then ship)", "Fewest bytes", "How few bits", "Which tokens", "What the sources claim"]
    assert [page.index(x) for x in order] == sorted(page.index(x) for x in order)
    assert page.index("The headline") < page.index("every codec") < page.index("every scorer")
    built = tmp_path / "docs" / "results" / "construction-x.md"
    assert built.read_text().count("Dropped tokens were hidden while the cache was built") == 1
    for page in (p for p in tmp_path.rglob("*.md")):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if not link.startswith("docs/policy"):
                assert (page.parent / link.partition("#")[0]).is_file(), (page, link)


def test_grid_crosses_budgets_and_policies() -> None:
    recipes = grid(["h2o"], [0.5], ["bf16"], "", budgets=["uniform", "sparsity"], modalities=["uniform", "adaptive"])
    assert recipes[2:] == (
        "h2o@0.5|bf16",
        "h2o@0.5,modality=adaptive|bf16",
        "h2o@0.5,budget=sparsity|bf16",
        "h2o@0.5,budget=sparsity,modality=adaptive|bf16",
    )
