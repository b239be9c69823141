"""The sweep on an untrained model: pairing, honest bytes, resuming, and both protocols kept apart."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvferry.cli.app import app
from kvferry.errors import BudgetError, InputError
from kvferry.evaluate import records
from kvferry.evaluate.divergence import output_error
from kvferry.evaluate.records import read
from kvferry.evaluate.sweep import Sweep, run, run_sample
from kvferry.evaluate.tables import FEW, few_note, markdown_table, summarise
from kvferry.models import VLM, load
from kvferry.recipe import compress, decompress
from kvferry.selection import SINKS
from kvferry.testbed import samples
from kvferry.testbed.build import Size, build_model, write_folder
from study.__main__ import app as study

RECIPES = ("full|bf16", "none|bf16", "q2c@0.25|int4", "knorm@0.5|int8|zstd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    size = Size(layers=2, hidden=64, heads=2, kv_heads=1, intermediate=96, tower_depth=1, tower_width=32, tower_heads=2)
    write_folder(build_model(size), path)
    return path


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    return load(folder)


@pytest.fixture
def plan(folder: Path) -> Sweep:
    return Sweep(str(folder), RECIPES, split="validation", n=2, max_new_tokens=2)


def test_bytes_are_those_of_the_real_bitstream(vlm: VLM, plan: Sweep) -> None:
    (sample,) = samples("validation", 1)
    line = run_sample(vlm, sample, plan, "A")
    assert list(line.outcomes) == list(RECIPES)
    prefilled = vlm.prefill(sample.images, sample.question, recipe="q2c@0.25|int4")
    assert line.outcomes["q2c@0.25|int4"][1] == len(compress(prefilled, "q2c@0.25|int4"))
    assert line.bf16_bytes == prefilled.cache.full_bf16_bytes
    assert line.tokens == len(prefilled.cache.layout)
    assert line.length == prefilled.cache.length == line.tokens - 1
    layers = [x.keys.nbytes + x.values.nbytes for x in prefilled.cache]
    assert line.bf16_bytes == sum(layers), "the reference is the cache as it would cross, in 16 bits"


def test_a_row_says_what_its_scorer_chose(vlm: VLM, folder: Path) -> None:
    (sample,) = samples("validation", 1)
    recipes = ("full|bf16", "none|bf16", "knorm@0.001|bf16", "h2o@0.05|bf16", "snapkv@0.01,modality=text_preserving")
    for apply in ("post_hoc", "construction"):
        plan = Sweep(str(folder), recipes, protocols=("A",), max_new_tokens=2, apply=apply)
        line = run_sample(vlm, sample, plan, "A")
        rows = {row: outcome.scored for row, outcome in line.outcomes.items()}
        assert [rows[row] for row in ("full|bf16", "none|bf16", "knorm@0.001|bf16")] == [None, None, 0.0]
        keep = round(0.05 * line.length)
        chosen = max(keep - SINKS - keep // 2, math.ceil(keep / 4))
        assert rows["h2o@0.05|bf16"] == pytest.approx(chosen / keep, abs=1e-4)
        assert rows["snapkv@0.01,modality=text_preserving|bf16"] == 0.0
    table = summarise([line, replace(line, index=1)], "A")
    marked = [row.selection for row in table if FEW in row.label]
    assert marked == ["knorm@0.001", "snapkv@0.01,modality=text_preserving"]
    assert f"| knorm@0.001 {FEW} |" in markdown_table(table)
    assert "chose less than 25%" in few_note([row.scored for row in table])[1]


def test_older_files_are_corrected_by_the_last_token(tmp_path: Path) -> None:
    """They took the whole prompt, 257 tokens of 1536 bytes, where the cache of protocol A holds one less."""
    old = {"index": 0, "kind": "colour", "bf16_bytes": 394752, "image_bytes": 1, "tokens": 257}
    rows = ["full|bf16", "snapkv@0.03|bf16", "snapkv@0.1,budget=shared|int4", "knorm@0.01|bf16", "knorm@0.05|bf16"]
    rows += ["q2c@0.01|bf16", "q2c@0.05|bf16", "h2o@0.1,modality=adaptive|bf16", "image:90"]
    outcomes = {"outcomes": {row: [1, 393405] for row in rows}}
    path = tmp_path / "old.jsonl"
    head = json.dumps({"sweep": {}})
    path.write_text("".join(f"{x}\n" for x in [head, *(json.dumps(old | outcomes | {"protocol": p}) for p in "AB")]))
    a, b = records.read(path)[1]
    assert (a.bf16_bytes, a.length) == (256 * 1536, 256)
    assert (b.bf16_bytes, b.length) == (394752, 257)
    scored = [x.scored for x in a.outcomes.values()]
    assert scored == [None, 0.0, round(9 / 26, 4), 0.0, round(9 / 13, 4), 0.0, None, None, None]
    with records.Scribe(path) as file:
        file.write(replace(a, index=1))
    assert records.read(path)[1][-1] == replace(a, index=1), "what is written today is read as it is"


def test_a_forced_answer_is_judged_like_a_generated_one() -> None:
    cloud = load("testbed/cloud")
    recipes = ("full|bf16", "random@0.5|bf16", "random@0.2|int4", "none|int8")
    judged = {"generate": [], "forced": []}
    for check, rows in judged.items():
        plan = Sweep("testbed/cloud", recipes, check=check)
        for sample in samples("validation", 8):
            for protocol in ("A", "B"):
                outcomes = run_sample(cloud, sample, plan, protocol).outcomes
                rows.append([x.correct for x in outcomes.values()])
    assert judged["forced"] == judged["generate"]
    flat = [x for row in judged["forced"] for x in row]
    assert 0 < sum(flat) < len(flat)


def test_caches_of_one_prompt_are_scored_together(vlm: VLM) -> None:
    (sample, other) = samples("validation", 2)
    prefilled = vlm.prefill(sample.images, sample.question, recipe="snapkv@0.3,budget=head|bf16")
    rows = ("full|bf16", "knorm@0.5|bf16", "snapkv@0.3|bf16", "snapkv@0.3,budget=head|bf16", "knorm@0.1|int4")
    caches = [decompress(compress(prefilled, r)) for r in rows]
    outputs: list[torch.Tensor] = []
    together = vlm.score_many(caches, [5, 6], outputs=outputs)
    assert [len(x) for x in outputs] == [len(caches)] * len(caches[0].layers)
    errors = [output_error([x[0] for x in outputs], [x[i] for x in outputs]) for i in range(len(caches))]
    assert errors[0] == 0
    assert all(0 < error < 2 for error in errors[1:])
    for cache, scores in zip(caches, together, strict=True):
        torch.testing.assert_close(scores, vlm.score(cache, [5, 6]), atol=2e-2, rtol=2e-2)
    stranger = vlm.prefill(other.images, other.question + " now").cache
    with pytest.raises(InputError, match="different prompts"):
        vlm.score_many([caches[0], stranger], [5])


def test_protocol_b_labels_what_it_may_not_know(vlm: VLM, plan: Sweep) -> None:
    (sample,) = samples("validation", 1)
    line = run_sample(vlm, sample, plan, "B")
    assert set(line.outcomes) == {*RECIPES} - {"q2c@0.25|int4"} | {"q2c@0.25|int4 proxy", "q2c@0.25|int4 oracle"}
    assert line.tokens < run_sample(vlm, sample, plan, "A").tokens


def test_protocol_b_runs_every_kind_of_scorer(folder: Path, vlm: VLM) -> None:
    recipes = ("full|bf16", "snapkv@0.5|bf16", "vlcache@0.5|bf16", "h2o@0.5|bf16", "knorm@0.5,budget=sparsity|bf16")
    (sample,) = samples("validation", 1)
    rows = set(run_sample(vlm, sample, Sweep(str(folder), recipes), "B").outcomes)
    aware = {f"{r} {label}" for r in recipes if not r.startswith(("full", "h2o")) for label in ("proxy", "oracle")}
    assert rows == aware | {"full|bf16", "snapkv@0.5|bf16", "h2o@0.5|bf16"}


def test_pictures_and_embeddings_cross_too(vlm: VLM, folder: Path) -> None:
    (sample,) = samples("validation", 1)
    recipes = ("full|bf16", "full|int8", "full|int1")
    plan = Sweep(str(folder), recipes, check="forced", jpeg=(90, 10), embeds=("bf16", "int2"))
    line = run_sample(vlm, sample, plan, "A")
    assert [*line.outcomes] == [*plan.recipes, "image:90", "image:10", "embeds:bf16", "embeds:int2"]
    assert line.outcomes["image:90"].bytes == line.image_bytes > line.outcomes["image:10"].bytes
    far = [x.kl for x in line.outcomes.values()]
    assert far[0] == 0
    assert far[2] > far[1] >= 0
    moved = [x.attention for x in line.outcomes.values()]
    assert moved[0] == 0 < moved[1] < moved[2] < 2
    assert line.outcomes["embeds:bf16"].kl == pytest.approx(0, abs=1e-6)
    assert line.outcomes["embeds:bf16"].bytes > 2 * line.outcomes["embeds:int2"].bytes
    assert "image:90" not in run_sample(vlm, sample, plan, "B").outcomes


def test_construction_drops_the_same_tokens_but_earlier(vlm: VLM, folder: Path) -> None:
    recipes = ("full|bf16", "none|bf16", "q2c@0.25|bf16")
    (sample,) = samples("validation", 1)
    after = run_sample(vlm, sample, Sweep(str(folder), recipes, ("A",)), "A").outcomes
    early = run_sample(vlm, sample, Sweep(str(folder), recipes, ("A",), apply="construction"), "A").outcomes
    assert after.keys() == early.keys()
    assert after["full|bf16"] == early["full|bf16"]
    for row in recipes[1:]:
        assert abs(after[row][1] - early[row][1]) < 20  # the recipe's name in the header
    with pytest.raises(InputError, match="--protocols A"):
        Sweep(str(folder), recipes, apply="construction")


def test_only_the_kinds_that_were_asked_for(folder: Path, tmp_path: Path) -> None:
    plan = Sweep(str(folder), ("full|bf16",), ("A",), "validation", 4, kinds=("word", "exist"), max_new_tokens=1)
    assert [x.kind for x in run(plan, tmp_path / "r.jsonl")] == ["word", "exist"] * 2


def test_a_sweep_is_continued_where_it_stopped(plan: Sweep, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert len(list(run(plan, whole))) == 4
    assert not list(run(plan, whole))
    text = whole.read_text().splitlines(keepends=True)
    broken.write_text("".join(text[:3]) + text[3][:40])
    assert len(list(run(plan, broken))) == 2
    assert sorted(map(str, read(broken)[1])) == sorted(map(str, read(whole)[1]))


def test_two_processes_give_what_one_gives(plan: Sweep, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    list(run(plan, one))
    list(run(plan, two, processes=2))
    assert sorted(map(str, read(two)[1])) == sorted(map(str, read(one)[1]))


def test_another_sweep_is_not_mixed_in(plan: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"
    list(run(plan, out))
    other = Sweep(plan.model, ("full|bf16",), split="validation", n=1)
    with pytest.raises(InputError, match="another sweep"):
        list(run(other, out))


@pytest.mark.parametrize("apply", ["post_hoc", "construction"])
def test_what_must_stay_may_need_more_than_the_fraction(vlm: VLM, apply: Any) -> None:
    (sample,) = samples("validation", 1)
    recipes = ("full|bf16", "knorm@0.02|bf16", "knorm@0.02,modality=text_preserving|bf16")
    line = run_sample(vlm, sample, Sweep("x", recipes, ("A",), apply=apply), "A")
    full, small, preserved = (line.outcomes[r][1] for r in recipes)
    assert small < preserved < full / 4
    with pytest.raises(BudgetError, match="smallest bitstream"):
        run_sample(vlm, sample, Sweep("x", ("knorm,bytes=10|bf16",), ("A",)), "A")


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"
    words = ["sweep", "--model", "testbed/edge", "--out", str(out), "--split", "validation", "--n=1", "--processes=1"]
    for recipe in RECIPES:
        words += ["--recipe", recipe]
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    table = json.loads(done.stdout.splitlines()[-1])
    assert {row["recipe"] for row in table["A"]} == set(RECIPES)
    assert all(row["n"] == 1 for row in table["A"] + table["B"])
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "ceiling" in again.stdout
    page = tmp_path / "RESULTS.md"
    words = ["results", "--raw", str(tmp_path), "--out", str(page), "--figures", str(tmp_path / "figures")]
    words += ["--details", str(tmp_path / "details")]
    assert CliRunner().invoke(study, words, catch_exceptions=False).exit_code == 0
    assert "(details/x.md)" in page.read_text()
    assert "Protocol B" in (tmp_path / "details" / "x.md").read_text()


def test_names_of_rows_are_written_once(plan: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    wanted = list(run(plan, out))
    kinds = [type(json.loads(text)["outcomes"]) for text in out.read_text().splitlines()[1:]]
    assert kinds == [dict, dict, list, list]
    assert read(out)[1] == wanted
