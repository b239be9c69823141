"""The models that ship with the project answer what their cards say they answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.codecs.mixed import read_bits
from kvferry.codecs.profile_store import has_profile
from kvferry.models import load
from kvferry.recipe import compress, decompress
from kvferry.testbed.data import samples
from kvferry.testbed.evaluate import Testbed, exact_match

SHIPPED = Path(__file__).parents[2] / "testbed"
NAMES = sorted(path.parent.name for path in SHIPPED.glob("*/model.safetensors"))


def test_the_pair_ships() -> None:
    assert {"cloud", "edge"} <= set(NAMES)


@pytest.mark.parametrize("name", ["cloud", "edge"])
def test_shipped_model_reaches_its_figure(name: str) -> None:
    """On 39 test questions, within three standard errors of the accuracy that the card states."""
    stated = json.loads((SHIPPED / name / "evaluation.json").read_text())["overall"]["accuracy"]
    testbed, drawn = Testbed.load(SHIPPED / name), list(samples("test", 39))
    answers = testbed.answers(drawn)
    right = sum(exact_match(said, sample.answer) for said, sample in zip(answers, drawn, strict=True))
    spread = (stated * (1 - stated) / len(drawn)) ** 0.5
    assert right / len(drawn) >= stated - 3 * spread


@pytest.mark.parametrize("name", ["cloud", "edge"])
def test_shipped_widths_belong_to_the_shipped_model(name: str) -> None:
    """And a cache by them takes less than 4 bits a number."""
    vlm = load(SHIPPED / name)
    assert len(read_bits(str(SHIPPED / name / "mixed.json"), vlm.fingerprint)) == vlm.layers
    (drawn,) = samples("validation", 1)
    seen = vlm.prefill(drawn.images, drawn.question)
    assert len(compress(seen, f"full|mixed@{SHIPPED / name / 'mixed.json'}")) < len(compress(seen, "full|int4"))


def test_batched_answers_are_the_single_ones() -> None:
    testbed, drawn = Testbed.load(SHIPPED / "edge"), list(samples("validation", 12))
    batched = testbed.answers(drawn)
    single = [testbed.answers([sample])[0] for sample in drawn]
    assert sum(a == b for a, b in zip(batched, single, strict=True)) >= 11


@pytest.mark.parametrize("name", NAMES)
def test_card_states_the_measured_figures(name: str) -> None:
    report = json.loads((SHIPPED / name / "evaluation.json").read_text())
    card = (SHIPPED / name / "README.md").read_text()
    assert report["overall"]["n"] >= 1000
    for row in [report["overall"], *report["kinds"].values()]:
        assert f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}] ({row['n']})" in card


@pytest.mark.parametrize("name", ["cloud", "edge", "control"])
def test_a_profile_of_the_transform_codec_ships_with_each_model(name: str) -> None:
    vlm = load(f"testbed/{name}")
    assert has_profile(vlm.fingerprint)
    (sample,) = samples("validation", 1)
    prefilled = vlm.prefill(sample.images, sample.question, recipe="leaveout@0.1,budget=shared")
    blob = compress(prefilled, "leaveout@0.1,budget=shared|transform")
    assert len(blob) < prefilled.cache.full_bf16_bytes / 100
    assert vlm.answer(decompress(blob), max_new_tokens=4) == vlm.answer(prefilled.cache, max_new_tokens=4)


def test_the_unfinished_models_card_states_its_figures_and_that_it_is() -> None:
    report = json.loads((SHIPPED / "smol" / "evaluation.json").read_text())
    card = (SHIPPED / "smol" / "README.md").read_text()
    for row in [report["overall"], *report["kinds"].values()]:
        assert f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}] ({row['n']})" in card
    assert "unfinished" in card
