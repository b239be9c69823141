"""Calibrating bases that scale, on an untrained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvferry.analyze.source import drawn_questions
from kvferry.cli.app import app
from kvferry.codecs import profile as profiles
from kvferry.codecs.tree import CLASSES, TreeProfile
from kvferry.errors import InputError
from kvferry.fit.tree import TreeCalibration, make_tree
from kvferry.models import VLM
from kvferry.recipe import Recipe, compress, decompress
from kvferry.testbed import samples


def test_the_command_makes_one_that_serves(folder: Path, vlm: VLM, tmp_path: Path) -> None:
    out = tmp_path / "tree.profile"
    command = [
        "calibrate",
        str(folder),
        "--structure",
        "tree",
        "--n",
        "6",
        "--probes",
        "1",
        "--out",
        str(out),
        "--json",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["bytes"] == out.stat().st_size
    assert told["seconds"] > 0
    assert told["tree_bytes"]["Qwen2-VL-7B"] < 100e6
    profile, _ = profiles.read(out)
    assert isinstance(profile, TreeProfile)
    (sample,) = samples("validation", 1)
    prefilled = vlm.prefill(sample.images, sample.question)
    sizes, errors = [], []
    for ratio in (4, 32):
        blob = compress(prefilled, f"full|transform:{ratio}@{out}")
        back = decompress(blob)
        sizes.append(len(blob))
        pairs = zip(prefilled.cache, back, strict=True)
        errors.append(sum(float((a.values - b.values).float().square().sum()) for a, b in pairs))
    assert sizes[0] > 2 * sizes[1]
    assert errors[0] < errors[1]


def test_a_rank_is_refused_with_a_tree(folder: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", str(folder), "--structure", "tree", "--rank", "8"])
    assert isinstance(result.exception, InputError)
    assert "no rank" in str(result.exception)


def test_what_repeats_is_a_template_and_the_question_matters_more(vlm: VLM) -> None:
    calibration = TreeCalibration(vlm, Recipe.parse("full"), probes=1)
    for asked in drawn_questions("calibration", 6).each():
        calibration.add(asked)
    profile = calibration.profile({})
    (sample,) = samples("validation", 1)
    layout = vlm.prefill(sample.images, sample.question).cache.layout
    template = int(layout.visual.argmax())
    assert len(profile.starts) == template > 0
    assert profile.steps[CLASSES.index("visual")] == 0
    assert profile.steps[CLASSES.index("tail")] > 0
    told = profile.facts["classes"]
    assert sum(of["energy"] for of in told.values()) == pytest.approx(1, abs=1e-3)
    assert [of["octaves"] for of in told.values()] == [int(profile.steps[CLASSES.index(name)]) for name in told]
    assert 0 < profile.facts["words"]["energy"] < 1


def test_axes_by_falling_deviation_and_few_rows_turn_little() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight = torch.eye(8).expand(8, 8, 8).contiguous()
    tree = make_tree(torch.zeros(64), mixed.clone(), weight, layers=2)
    c = tree.forward(mixed, 64)
    assert torch.allclose(c.square().sum(), mixed.square().sum(), rtol=1e-4)
    deviation = c.square().mean(0).sqrt().log2() * 8
    assert float((deviation - torch.from_numpy(tree.ranked).float()).abs().max()) < 0.51
    assert len(make_tree(torch.zeros(64), mixed[:20].clone(), weight, layers=2).joint) <= 10
