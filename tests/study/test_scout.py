"""Mode scout on trial: what is counted is what mode scout sends and keeps, and files go on where they stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kvferry import VLM, InputError, load
from kvferry.errors import RecipeError
from kvferry.evaluate.forced import forced_logits, says
from kvferry.modes import Holdings, Question, parse_mode
from kvferry.modes.ranking import kept_visual, selection_of
from kvferry.recipe import Recipe
from kvferry.selection import evict, kept_count
from kvferry.testbed import Sample, samples
from study.scout import ScoutLine, Trial, read, run, try_question
from study.scout_rows import Scouted

TRIAL = Trial("testbed/edge", "testbed/cloud", ("q2c", "vlcache"), (0.5, 0.1), split="validation", n=2)


@pytest.fixture(scope="module")
def edge() -> VLM:
    return load("testbed/edge")


@pytest.fixture(scope="module")
def cloud() -> VLM:
    return load("testbed/cloud")


@pytest.fixture(scope="module")
def asked() -> list[Sample]:
    return list(samples("validation", 3))


@pytest.fixture(scope="module")
def lines(edge: VLM, cloud: VLM, asked: list[Sample]) -> list[ScoutLine]:
    return [try_question(edge, cloud, sample, TRIAL) for sample in asked]


def test_the_bytes_are_those_that_mode_scout_sends(edge: VLM, asked: list[Sample], lines: list[ScoutLine]) -> None:
    for sample, line in zip(asked, lines, strict=True):
        for ranking, found in zip(TRIAL.rankings, line.found, strict=True):
            sender = parse_mode(f"scout:{ranking}").sender(edge, Question(sample.images, sample.question), Holdings())
            sender.start()
            sender.prepare()
            assert len(list(sender.chunks())[-1]) == found.sent
            assert min(found.runs, found.coded, -(-line.visual // 8)) < found.sent


def test_the_answers_are_the_caches_own(edge: VLM, cloud: VLM, asked: list[Sample], lines: list[ScoutLine]) -> None:
    """Here by generating, in the trial by feeding the true answer."""
    for sample, line in zip(asked, lines, strict=True):
        here = edge.prefill(sample.images, sample.question, recipe="q2c@0.1")
        there = cloud.prefill(sample.images, sample.question, recipe="q2c@0.1")
        assert line.full == (cloud.answer(there.cache) == sample.answer)
        assert line.alone == (edge.answer(here.cache) == sample.answer)
        found = line.found[TRIAL.rankings.index("q2c@0.1")]
        sets = {name: kept_visual(x, Recipe.parse("q2c@0.1")) for name, x in (("own", there), ("edge", here))}
        assert (sets["own"] & sets["edge"]).sum() == found.both
        for name, mask in sets.items():
            said = cloud.answer(evict(there.cache, selection_of(there, mask)))
            assert getattr(found, name) == (said == sample.answer)


def test_a_model_agrees_with_itself(cloud: VLM, asked: list[Sample]) -> None:
    trial = replace(TRIAL, edge="testbed/cloud", scorers=("leaveout",))
    line = try_question(cloud, cloud, asked[0], trial)
    assert [x.both for x in line.found] == [kept_count(f, line.visual) for f in trial.fractions]
    assert all(x.own == x.edge for x in line.found)
    assert line.alone == line.full


def test_a_wrong_answer_is_not_said(cloud: VLM, asked: list[Sample]) -> None:
    sample = asked[0]
    cache = cloud.prefill(sample.images, sample.question).cache
    said = cloud.answer(cache)
    for text, expected in ((said, True), (f"{said} {said}", False)):
        assert says(cloud, forced_logits(cloud, {"full": cache}, text)["full"], text) == expected


def test_a_file_is_continued_and_kept_apart(tmp_path: Path, lines: list[ScoutLine]) -> None:
    out = tmp_path / "scout.jsonl"
    assert list(run(TRIAL, out, "python -m study scout-overlap")) == lines[:2]
    out.write_text(out.read_text() + '[2,"co')
    assert list(run(replace(TRIAL, n=3), out)) == lines[2:]
    head, found = read(out)
    assert found == lines
    assert (head["command"], head["model"]) == ("python -m study scout-overlap", "testbed/cloud")
    assert Scouted(head, found).trial == TRIAL
    for other in (replace(TRIAL, fractions=(0.5,)), replace(TRIAL, edge="testbed/control")):
        with pytest.raises(InputError, match="another trial"):
            next(run(other, out))
    (tmp_path / "other").write_text('{"sweep": {}}\n')
    with pytest.raises(InputError, match="not a results file"):
        read(tmp_path / "other")
    with pytest.raises(InputError, match="scout-overlap"):
        read(tmp_path / "absent")


def test_what_cannot_be_tried() -> None:
    with pytest.raises(RecipeError, match="no fraction"):
        Trial("a", "b", ("full",))
    with pytest.raises(InputError, match="--n"):
        Trial("a", "b", n=0)


def test_older_files_are_corrected_by_the_last_token(lines: list[ScoutLine], cloud: VLM, tmp_path: Path) -> None:
    """They took the whole prompt for the size of the cloud's cache, which holds one token less."""
    token = 4 * cloud.layers * cloud.kv_heads * cloud.head_dim
    old = [replace(x, index=i, bf16_bytes=token * (200 + i)) for i, x in enumerate(lines)]
    path = tmp_path / "old.jsonl"
    records = [list(asdict(x).values())[:-1] for x in old]
    path.write_text("".join(json.dumps(x) + "\n" for x in [{"scout": {}}, *records]))
    assert [(x.bf16_bytes, x.length) for x in read(path)[1]] == [(token * n, n) for n in (199, 200, 201)]
    assert all(x.bf16_bytes == token * x.length for x in lines)
