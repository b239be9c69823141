"""Benchmarks on untrained models: pictures and text, both protocols, perplexity, resuming, tables."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

from kvferry.cli.app import app
from kvferry.errors import BudgetError, InputError
from kvferry.evaluate import evaluation as engine
from kvferry.evaluate import records
from kvferry.evaluate.data import source_of
from kvferry.evaluate.evaluation import Asked, Evaluation, Reply, ask, read, run
from kvferry.evaluate.evaluation_tables import Row, notes, summarise
from kvferry.evaluate.tasks import Example, task_of
from kvferry.evaluate.tasks.wikitext import WikiText
from kvferry.models import VLM, load
from kvferry.plugins import Registry
from kvferry.recipe import compress, decompress
from kvferry.statistics import Estimate
from kvferry.testbed import samples
from kvferry.testbed.build import Size, build_model, build_tokenizer, write_folder
from study.__main__ import app as study
from study.evaluation_tables import render
from study.page import Places
from tests.models.families import TEXT

RECIPES = ("full|bf16", "none|bf16", "q2c@0.25|int4", "knorm@0.5|int8|zstd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    size = Size(layers=2, hidden=64, heads=2, kv_heads=1, intermediate=96, tower_depth=1, tower_width=32, tower_heads=2)
    model = build_model(size)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "language_model" in name:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)
    write_folder(model, path)
    return path


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of words alone, with the testbed's."""
    path, tokenizer = tmp_path_factory.mktemp("model") / "words", build_tokenizer()
    torch.manual_seed(1)
    settings = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    return load(folder)


@pytest.fixture(scope="module")
def words(text_folder: Path) -> VLM:
    return load(text_folder)


@pytest.fixture
def mme(tmp_path: Path) -> Path:
    """Two questions on each of two drawn pictures."""
    lines = []
    for i, drawn in enumerate(samples("validation", 2)):
        drawn.images[0].save(tmp_path / f"{i}.png")
        for answer in ("Yes", "No"):
            lines.append({"image": f"{i}.png", "question_id": str(i), "question": f"is it red {i}?", "answer": answer,
                          "category": "color"})  # fmt: skip
    path = tmp_path / "mme.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    lines = [
        {"context": "tom left the red circle right of the large blue square", "question": f"what is {x}?",
         "answers": {"text": answers}}
        for x, answers in (("red", ["circle", "the circle"]), ("small", []))
    ]  # fmt: skip
    path = tmp_path / "squad.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_row_is_the_recipes_real_stream(vlm: VLM) -> None:
    task = task_of("testbed")
    example = task.read({"split": "validation", "index": 0})
    line = ask(vlm, task, example, RECIPES, "A", 5)
    assert (line.index, line.references, line.kind) == (5, example.references, example.kind)
    assert list(line.outcomes) == list(RECIPES)
    prefilled = vlm.prefill(example.images, example.question, recipe="q2c@0.25|int4")
    blob = compress(prefilled, "q2c@0.25|int4")
    reply = line.outcomes["q2c@0.25|int4"]
    assert reply.bytes == len(blob)
    assert reply.said == vlm.answer(decompress(blob), max_new_tokens=task.max_new_tokens)
    assert reply.score == task.metric.score(reply.said, example.references)


def test_loyalty_is_taken_along_the_full_caches_answer(vlm: VLM) -> None:
    task = task_of("testbed")
    example = task.read({"split": "validation", "index": 1})
    line = ask(vlm, task, example, RECIPES, "A")
    full = decompress(compress(vlm.prefill(example.images, example.question), "full|bf16"))
    said = vlm.resume(full, max_new_tokens=task.max_new_tokens)
    along = list(said.token_ids)
    steps = len(along) + (len(along) < task.max_new_tokens)
    floor = decompress(compress(vlm.prefill(example.images, example.question), "none|bf16"))
    mine, other = (vlm.score(x, along)[:steps] for x in (full, floor))
    agree = (mine.argmax(-1) == other.argmax(-1)).double().mean().item()
    assert line.outcomes["full|bf16"][2:5] == (0.0, 1.0, said.text)
    assert line.outcomes["none|bf16"].agree == pytest.approx(agree, abs=1e-5)
    assert line.outcomes["none|bf16"].kl > 0


def test_an_answer_is_not_generated_twice_and_still_the_same(vlm: VLM) -> None:
    task = task_of("testbed")
    for index in range(3):
        example = task.read({"split": "validation", "index": index})
        recipes = ("full|bf16", "knorm@0.9|int8", "random@0.5|int4", "none|bf16")
        line = ask(vlm, task, example, recipes, "B")
        for row, reply in line.outcomes.items():
            scene = vlm.prefill(example.images, recipe=row)
            cache = decompress(compress(scene, row))
            assert reply.said == vlm.answer(cache, example.question, max_new_tokens=task.max_new_tokens)


def test_protocol_b_labels_what_it_may_not_know(vlm: VLM, words: VLM) -> None:
    task = task_of("testbed")
    line = ask(vlm, task, task.read({"split": "validation", "index": 0}), RECIPES, "B")
    labelled = {"q2c@0.25|int4 proxy", "q2c@0.25|int4 oracle"}
    assert set(line.outcomes) == {*RECIPES} - {"q2c@0.25|int4"} | labelled
    squad = task_of("squad_v2")
    example = Example(question="what is red ?", context="tom left the red circle right of the blue square")
    text = ask(words, squad, example, ("full|bf16", "q2c@0.5|int4"), "B")
    assert list(text.outcomes) == ["full|bf16", "q2c@0.5|int4 proxy", "q2c@0.5|int4 oracle", "prompt"]
    assert text.outcomes["prompt"].bytes == len("what is red ?")
    assert text.outcomes["full|bf16"].bytes > text.outcomes["q2c@0.5|int4 oracle"].bytes


def test_the_bare_question_knows_no_context(words: VLM) -> None:
    squad, question = task_of("squad_v2"), "what is red ?"
    lines = [
        ask(words, squad, Example(question=question, context=context), ("full|bf16",), "A")
        for context in ("tom is red", "the large square is left of ann")
    ]
    assert lines[0].outcomes["prompt"].said == lines[1].outcomes["prompt"].said
    assert lines[0].outcomes["full|bf16"].said != lines[1].outcomes["full|bf16"].said


def test_perplexity_of_the_full_cache_is_the_models_own(words: VLM) -> None:
    task = WikiText(prefix=24, continuation=6)
    ids = torch.randint(8, 60, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    example = Example(prefix=tuple(ids[:24]), continuation=tuple(ids[24:]))
    line = ask(words, task, example, ("full|bf16", "knorm@0.5|int4", "q2c@0.5|int4", "snapkv@0.5|int2"), "B")
    with torch.inference_mode():
        logits = words.model(torch.tensor([ids])).logits[0, 23:29].double()
    own = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[24:])).item()
    assert line.outcomes["full|bf16"].score == pytest.approx(own, rel=2e-2)
    assert line.outcomes["full|bf16"][2:4] == (0.0, 1.0)
    assert len({reply.score for reply in line.outcomes.values()}) == 5
    with torch.inference_mode():
        alone = words.model(torch.tensor([ids[22:]])).logits[0, 1:7].double()
    floor = torch.nn.functional.cross_entropy(alone, torch.tensor(ids[24:])).item()
    assert line.outcomes["prompt"].score == pytest.approx(floor, rel=2e-2)


def test_windows_of_a_text_become_a_table(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(WikiText):
        def __init__(self) -> None:
            super().__init__(prefix=20, continuation=4)

    monkeypatch.setattr("kvferry.evaluate.tasks.TASKS", Registry("tasks", {"wikitext": Short}))
    names = build_tokenizer().convert_ids_to_tokens(list(range(18, 60)))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": " ".join(names)}) for _ in range(2)))
    plan = Evaluation(str(text_folder), "wikitext", ("knorm@0.5|int4",), data=str(tmp_path / "t.jsonl"))
    assert plan.protocols == ("B",)
    lines = list(run(plan, tmp_path / "w.jsonl"))
    tokens = load(text_folder).tokenizer("\n\n".join([" ".join(names)] * 2))["input_ids"]
    assert 1 < len(lines) == len(tokens) // 24
    rows = summarise(Short(), lines, "B")
    mean = sum(x.outcomes["full|bf16"].score or 0 for x in lines) / len(lines)
    assert rows[0].score.mean == pytest.approx(math.exp(mean))
    assert [row.end for row in rows] == ["ceiling", "", "floor"]
    assert rows[2].ratio == float("inf")
    with pytest.raises(InputError, match="no protocol A"):
        Evaluation("x", "wikitext", protocols=("A",))


def test_an_evaluation_is_continued_where_it_stopped(folder: Path, mme: Path, tmp_path: Path) -> None:
    plan = Evaluation(str(folder), "mme", ("knorm@0.5|int4",), data=str(mme), n=10)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert len(list(run(plan, whole))) == 8
    assert not list(run(plan, whole))
    text = whole.read_text().splitlines(keepends=True)
    broken.write_text("".join(text[:4]) + text[4][:40])
    assert len(list(run(plan, broken))) == 5
    assert read(broken)[1] == read(whole)[1]
    with pytest.raises(InputError, match="another evaluation"):
        list(run(Evaluation(str(folder), "mme", ("knorm@0.25|int4",), data=str(mme)), whole))
    with pytest.raises(InputError, match="not a results file of `kvferry sweep`"):
        records.read(whole)
    with pytest.raises(InputError, match="no row 4"):
        list(run(Evaluation(str(folder), "mme", data=str(mme), start=4), tmp_path / "none.jsonl"))


def test_another_process_asks_the_same(text_folder: Path, squad: Path, tmp_path: Path) -> None:
    plan = Evaluation(str(text_folder), "squad_v2", ("knorm@0.5|int4",), ("A",), data=str(squad))
    here = list(run(plan, tmp_path / "one.jsonl"))
    start, job = pickle.loads(pickle.dumps((partial(engine._start, plan, None), engine._job)))
    start()
    rows = pickle.loads(pickle.dumps(list(source_of(task_of("squad_v2"), squad))))
    assert [job((row, index, "A")) for index, row in enumerate(rows)] == here


def test_what_cannot_be_asked_is_counted(vlm: VLM, tmp_path: Path) -> None:
    task = task_of("testbed")
    example = task.read({"split": "validation", "index": 0})
    odd = Example(example.images, "what is <|image_pad|> ?", ("red",))
    line = ask(vlm, task, odd, ("full|bf16",), "A", 1)
    assert "template token" in line.refused
    assert not line.outcomes
    fine = ask(vlm, task, example, ("full|bf16",), "A")
    rows = summarise(task, [fine, line], "A")
    assert rows[0].score.n == 1
    head = {"evaluation": {"task": "testbed"}}
    assert "1 questions could not be asked" in " ".join(notes(head, [fine, line], "A", rows))
    with pytest.raises(InputError, match="refused: the question contains"):
        summarise(task, [line], "A")
    with pytest.raises(BudgetError, match="smallest bitstream"):
        ask(vlm, task, example, ("full|bf16", "knorm,bytes=10|bf16"), "A")


def test_pictures_need_a_model_that_sees(text_folder: Path, mme: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reads text only"):
        list(run(Evaluation(str(text_folder), "mme", data=str(mme)), tmp_path / "x.jsonl"))


def replies(scores: dict[str, list[float]], groups: list[str]) -> Iterator[Asked]:
    for i, group in enumerate(groups):
        outcomes = {
            name: Reply(values[i], 10 * (k + 1), 0.1, 1.0, "yes" if values[i] else "no")
            for k, (name, values) in enumerate(scores.items())
        }
        yield Asked(i, "A", "color", group, 100, 5, ("yes",), outcomes)


def test_a_table_holds_every_row_against_the_ceiling() -> None:
    scores = {
        "full|bf16": [1.0] * 8, "none|bf16": [0.0] * 8, "knorm@0.5|int4": [1.0] * 7 + [0.0], "q2c@0.5|int4": [1.0] * 8,
    }  # fmt: skip
    lines = list(replies(scores, ["a", "a", "b", "b", "c", "c", "d", "d"]))
    rows = {row.name: row for row in summarise(task_of("mme"), lines, "A")}
    assert next(iter(rows)) == "full|bf16"
    assert list(rows)[-1] == "none|bf16"
    assert rows["none|bf16"].verdict == "lower"
    assert rows["none|bf16"].change == Estimate(-1, -1, -1, 8)
    assert rows["knorm@0.5|int4"].verdict == "no difference shown"
    assert rows["knorm@0.5|int4"].figures["acc+"].mean == 0.75
    assert rows["q2c@0.5|int4"].ratio == 2.5


@pytest.mark.parametrize(("low", "high", "said"), [(0.1, 0.2, "higher"), (-0.2, -0.1, "lower"), (-0.1, 0.1, "no diff")])
def test_the_verdict_is_that_of_the_interval(low: float, high: float, said: str) -> None:
    one = Estimate(0.0, 0.0, 0.0, 1)
    row: Any = Row("r", one, {}, Estimate((low + high) / 2, low, high, 9), one, one, 1.0, 1.0)
    assert row.verdict.startswith(said)


def known_textvqa(vlm: VLM, folder: Path) -> Path:
    """Two questions on each of two drawn pictures, which the model is right about."""
    task, lines = task_of("textvqa"), []
    for i, drawn in enumerate(samples("validation", 2)):
        drawn.images[0].save(folder / f"{i}.png")
        for asked in ("is it red ?", "what is left ?"):
            row = {"image": str(folder / f"{i}.png"), "image_id": str(i), "question": asked, "answers": "x"}
            question = task.read(row).question
            pictures = task.read(row).images
            said = [
                vlm.answer(vlm.prefill(pictures, question).cache, max_new_tokens=16),
                vlm.answer(vlm.prefill(pictures).cache, question, max_new_tokens=16),
            ]
            lines.append(json.dumps(row | {"image": f"{i}.png", "answers": said}))
    path = folder / "textvqa.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_the_command_prints_tables_and_results_reads_them(folder: Path, vlm: VLM, tmp_path: Path) -> None:
    out = tmp_path / "raw" / "eval-textvqa.jsonl"
    data = known_textvqa(vlm, tmp_path)
    line = ["eval", str(folder), "--task", "textvqa", "--data", str(data), "--recipe", "vlcache@0.5|int4"]
    line += ["--out", str(out)]
    done = CliRunner().invoke(app, [*line, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    tables = json.loads(done.stdout.splitlines()[-1])
    assert [row["name"] for row in tables["A"]] == ["full|bf16", "vlcache@0.5|int4", "none|bf16"]
    assert {row["score"]["n"] for rows in tables.values() for row in rows} == {4}
    again = CliRunner().invoke(app, line, catch_exceptions=False)
    assert "ceiling" in again.stdout
    page = tmp_path / "RESULTS.md"
    words = ["results", "--raw", str(out.parent), "--out", str(page), "--figures", str(tmp_path / "figures")]
    assert CliRunner().invoke(study, words, catch_exceptions=False).exit_code == 0
    detail = (tmp_path / "results" / f"{out.stem}.md").read_text()
    assert f"(results/{out.stem}.md)" in page.read_text()
    assert "textvqa, protocol B" in detail
    assert "vlcache@0.5\|int4 proxy" in detail
    assert "draw the 2 pictures" in render(out, Places(page, tmp_path, tmp_path), "TextVQA")
