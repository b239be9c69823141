"""The sources' recipe on made-up losses, measurements held against real bitstreams, and the command from a model on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from kvferry.analyze import Asked
from kvferry.cli.diagnose import diagnose as command
from kvferry.codecs.mixed import WIDTHS, part_size, read_bits
from kvferry.errors import BudgetError, FingerprintError, InputError
from kvferry.fit.damage import Damage, Probe, alone, compare, measure, uniform
from kvferry.fit.diagnose import BOTTLENECK_LOSS, MAX_LOSS, TIES, Diagnosis, decide, diagnose, plan_of, spend
from kvferry.models import VLM, load
from kvferry.recipe import Recipe, compress, decompress
from kvferry.testbed import samples
from tests.models.conftest import folder

__all__ = ["folder"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small passes: threads would cost more than they give, and far more where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> VLM:
    return load(folder)


def asked(n: int = 3, **changed: Any) -> list[Asked]:
    """Drawn questions whose answer is what the full cache says."""
    return [Asked("", tuple(x.images), x.question, **changed) for x in samples("calibration", n)]


def test_little_loss_needs_no_protection() -> None:
    assert decide(MAX_LOSS, [0.0, 0.2, 0.01]) == ("none", (1,))
    assert plan_of("none", (1,), 3, 4) == uniform(3, 4)


def test_damage_in_one_layer_is_concentrated() -> None:
    own = [0.23, *[0.0] * 6, BOTTLENECK_LOSS]
    assert decide(0.24, own) == ("concentrated", (0,))
    plan = plan_of("concentrated", (0,), 8, 4)
    assert plan[0] == (16,) * 4
    assert plan[1:] == uniform(7, 4)
    assert decide(0.24, [0.1, 0.0]) == ("concentrated", (0,))


def test_damage_in_many_layers_is_distributed() -> None:
    assert decide(0.3, [0.04, 0.04, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0]) == ("distributed", (0, 1, 2))
    assert decide(0.3, [0.01] * 8) == ("distributed", ())
    assert plan_of("distributed", (0, 1, 2), 8, 4) == uniform(8, 8)
    assert plan_of("distributed", (), 2, 8) == uniform(2, 16)


@given(st.floats(-0.2, 1), st.lists(st.floats(-0.2, 1), min_size=1, max_size=40))
def test_what_is_concentrated_is_protected(total: float, own: list[float]) -> None:
    pattern, bottlenecks = decide(total, own)
    plan = plan_of(pattern, bottlenecks, len(own), 4)
    spared = [layer for layer, widths in enumerate(plan) if widths == (16,) * 4]
    assert (pattern == "none") == (total <= MAX_LOSS)
    assert spared == (list(bottlenecks) if pattern == "concentrated" else [])
    assert all(own[layer] > BOTTLENECK_LOSS for layer in spared)
    assert len(spared) <= max(1, len(own) / 4)


def made(full: list[int], right: list[list[int]]) -> Damage:
    nothing = np.zeros(np.shape(right))
    counts = np.ones((len(full), 1, 4), int)
    return Damage(
        np.array(full, bool), np.array(right, bool), nothing, nothing.astype(int), counts, counts[0], counts[:, 0, 0]
    )


def test_loss_is_relative_to_the_full_cache() -> None:
    damage = made([1, 1, 0, 0], [[1, 0], [1, 0], [1, 1], [0, 0]])
    assert damage.losses.tolist() == [-0.5, 0.5]
    with pytest.raises(InputError, match="none of the questions"):
        _ = made([0], [[1]]).losses


def test_the_pattern_in_words() -> None:
    damage = made([1] * 10, [[0, 1, 0]] * 3 + [[1, 1, 1]] * 7)
    for pattern, bottlenecks, says in (
        ("none", (), "every layer takes 4 bits"),
        ("concentrated", (1,), "layer 1 loses over 3% alone and stays at 16 bits"),
        ("distributed", (0, 1), "layers 0, 1 each lose over 3% alone; every layer takes 8 bits"),
        ("distributed", (), "no layer stands out; every layer takes 8 bits"),
    ):
        found = Diagnosis(pattern, 4, bottlenecks, plan_of(pattern, bottlenecks, 2, 4), damage)  # type: ignore[arg-type]
        assert found.words.startswith(f"{pattern}: uniform INT4 loses 30.0%")
        assert found.words.endswith(says)


def test_a_mixture_is_what_a_bitstream_carries(tiny: VLM) -> None:
    probe = Probe(tiny, asked(1)[0])
    for bits in WIDTHS:
        recipe = Recipe.parse(f"full|int{bits}" if bits < 16 else "full|bf16")
        here, size = probe.mixture(uniform(tiny.layers, bits))
        for one, other in zip(here, recipe.apply(probe.full), strict=True):
            assert one.keys.equal(other.keys)
            assert one.values.equal(other.values)
        parts = zip(probe.vectors().flat, probe.dims().flat, strict=True)
        assert size == 2 * tiny.layers + sum(part_size(int(count), int(dim), bits) for count, dim in parts)
    assert probe.ask(probe.full) == (True, 0.0)


def test_measured_and_carried_agree(tiny: VLM) -> None:
    plans = [uniform(tiny.layers, 16), uniform(tiny.layers, 3), alone(tiny.layers, 1, [2, 3], 1)]
    here = measure(tiny, asked(), plans)
    there = compare(tiny, asked(), ["full|bf16", "full|int3"])
    assert np.array_equal(here.divergence[:, :2], there.divergence)
    assert np.array_equal(here.right[:, :2], there.right)
    assert here.full.all()
    assert (here.divergence[:, 0] == 0).all()
    assert (here.divergence[:, 1:] > 0).all()
    assert (there.sizes > here.sizes[:, :2]).all()
    assert here.tokens.tolist() == [Probe(tiny, one).full.length for one in asked()]


def test_a_true_answer_is_judged_by_itself() -> None:
    edge = load("testbed/edge")
    drawn = list(samples("validation", 12))
    damage = measure(edge, drawn, [uniform(edge.layers, 8), uniform(edge.layers, 1)])
    said = [edge.answer(edge.prefill(x.images, x.question).cache) == x.answer for x in drawn]
    assert damage.full.tolist() == said
    assert damage.losses[1] > max(damage.losses[0], 0.3)
    assert damage.divergence[:, 1].mean() > 100 * damage.divergence[:, 0].mean()
    assert diagnose(edge, lambda: drawn, 1).pattern == "distributed"


def test_the_budget_is_kept_and_the_narrowest_stated(tiny: VLM) -> None:
    full, narrow = spend(tiny, asked, 1e6), spend(tiny, asked, 40)
    assert full.plan == uniform(tiny.layers, 16)
    assert full.predicted(full.plan) == full.measured.divergence[:, 0].mean() == 0
    assert narrow.measured.sizes[:, 0].sum() <= 40 * narrow.measured.tokens.sum()
    assert narrow.predicted(narrow.plan) > 0
    for name, ties in TIES.items():
        plan = narrow.plans[name]
        assert all(len({widths[part] for part in tie}) == 1 for widths in plan for tie in ties)
        assert narrow.predicted(plan) >= narrow.predicted(narrow.plan)
        assert narrow.predicted(plan) <= narrow.predicted(narrow.plans["by layer"])
    within = narrow.measured.sizes[:, : len(TIES)].sum(0) <= 40 * narrow.measured.tokens.sum()
    assert within.all()
    with pytest.raises(BudgetError, match=r"INT1 everywhere takes \d+.\d bytes"):
        spend(tiny, asked, 3)


def test_without_questions_nothing_is_measured(tiny: VLM) -> None:
    with pytest.raises(InputError, match="no question"):
        measure(tiny, [], [uniform(tiny.layers, 4)])


def run(*arguments: str) -> str:
    app = Typer()
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """One with a picture, one of words alone."""
    (sample,) = samples("calibration", 1)
    sample.images[0].save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": sample.question}, {"question": "what is it?"}]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("goal", [("--bits", "2"), ("--bytes-per-token", "60")])
def test_from_a_model_to_a_recipe(
    folder: Path, tiny: VLM, questions: Path, tmp_path: Path, goal: tuple[str, str]
) -> None:
    out = tmp_path / "profile.json"
    words = (str(folder), "--questions", str(questions), "--out", str(out), *goal)
    printed, profile = json.loads(run(*words, "--json")), json.loads(out.read_text())
    assert printed == profile | {"out": str(out)}
    assert (profile["n"], profile["fingerprint"], profile["questions"]) == (
        2,
        tiny.fingerprint,
        "2 questions of questions.jsonl",
    )
    shown = run(*words)
    assert profile["words"] in shown.replace("\n", " ")
    assert f"full|mixed@{out}" in shown.replace("\n", "")
    assert ("by layer and modality" in shown) == ("together" in profile) == (goal[0] == "--bytes-per-token")
    (sample,) = samples("validation", 1)
    seen = tiny.prefill(sample.images, sample.question)
    blob = compress(seen, f"full|mixed@{out}")
    assert len(read_bits(str(out), tiny.fingerprint)) == tiny.layers
    assert decompress(blob).recipe == "full|mixed"
    out.write_text(json.dumps(profile | {"fingerprint": "of another"}))
    with pytest.raises(FingerprintError, match="kvferry diagnose"):
        compress(seen, f"full|mixed@{out}")


def test_a_check_compares_on_other_questions(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    words = ("testbed/edge", "--n", "6", "--check", "4", "--out", str(out))
    shown = run(*words)
    rows = json.loads(out.read_text())["check"]
    assert [row["recipe"] for row in rows[:-1]] == ["full|bf16", "full|int8", "full|int4", "full|int3", "full|int2"]
    assert rows[-1]["recipe"] == f"full|mixed@{out}"
    assert {row["n"] for row in rows} == {4}
    assert sorted(rows[:-1], key=lambda row: -row["bytes"]) == rows[:-1]
    assert "validation" in shown
    assert "own loss" in shown


def test_what_cannot_be_diagnosed(folder: Path, questions: Path, tmp_path: Path) -> None:
    for words, says in (
        (["--out", str(tmp_path / "no" / "p.json")], "no folder"),
        (["--out", str(tmp_path / "a,b.json")], "without , and"),
        (["--bits", "3", "--bytes-per-token", "90"], "leave it out"),
        (["--questions", str(questions), "--check", "2"], "leave it out"),
        (["--images", str(tmp_path)], "needs --data"),
        (["--split", "exam"], "choose one of"),
    ):
        with pytest.raises(InputError, match=says):
            run(str(folder), *words)
    with pytest.raises(InputError, match="cannot write"):
        run(str(folder), "--questions", str(questions), "--out", str(tmp_path))
