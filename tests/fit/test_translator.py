"""Learning a translator: what the sums give, what is refused, and that it helps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kvferry
from kvferry import VLM, FingerprintError, InputError
from kvferry.data import Asked
from kvferry.fit.learn import Schedule
from kvferry.fit.translator import (
    Network,
    Pair,
    Regression,
    Scene,
    divergence,
    drawn_scenes,
    error,
    fit_translator,
    nbytes,
    scenes_of,
)
from kvferry.testbed.build import build_model, write_folder
from kvferry.translator import apply, width
from tests.crossing.process import write_model
from tests.translate.conftest import SMALL


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = tmp_path_factory.mktemp("small") / "small"
    write_folder(build_model(SMALL, 3), folder)
    return kvferry.load(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return kvferry.load(str(write_model(tmp_path_factory.mktemp("large") / "large")), dtype="float32")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [Scene(x.name, x.images, None, x.questions[:2]) for x in drawn_scenes("train", 24)]


def test_the_regression_is_that_of_the_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draw) * torch.tensor([1.0, 5, 0.1, 1, 2, 3]) + 4
    y = x @ torch.randn(6, 8, generator=draw) + 3 + 0.1 * torch.randn(400, 8, generator=draw)
    sums = Regression(6, 8)
    for part in (x[:150], x[150:]):
        sums.add(part, y[:150] if len(part) == 150 else y[150:])
    tensors = sums.tensors(((1, 2), (2, 1)), hidden=5)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(400, 1)], 1), y).solution
    torch.testing.assert_close(apply(tensors, x), torch.cat([x, torch.ones(400, 1)], 1) @ best, rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(tensors["mean_in"], x.mean(0))
    torch.testing.assert_close(tensors["scale_in"], x.std(0, correction=0), rtol=1e-4, atol=1e-5)
    scale = y.var(0, correction=0).view(4, 2).mean(1).sqrt().repeat_interleave(2)
    torch.testing.assert_close(tensors["scale_out"], scale, rtol=1e-4, atol=1e-5)


def test_learning_lowers_the_error_of_scenes_that_were_not_seen(small: VLM, large: VLM, scenes: list[Scene]) -> None:
    pair = Pair(small, large)
    stages: list[str] = []
    schedules = Schedule(passes=3, rate=3e-4), None
    made = fit_translator(
        pair, scenes[:18], scenes[18:], 8, schedules, {"n": 24}, said=lambda stage, _: stages.append(stage)
    )  # fmt: skip
    assert stages == ["reconstruction"] * 3
    losses = made.facts["losses"]["reconstruction"]
    assert min(losses["held_out"]) < losses["before"] < 1, "the regression alone is better than the mean"
    assert (made.source, made.target) == (small.fingerprint, large.fingerprint)
    assert made.hidden == 8
    assert len(made.to_bytes()) == pytest.approx(nbytes(made.shapes, made.target_shapes, 8), rel=0.2)


def test_a_perfect_translation_loses_nothing(small: VLM, large: VLM, scenes: list[Scene]) -> None:
    pair = Pair(small, large)
    example = pair.example(scenes[0])
    network = Network(_sums(example.rows, example.wanted).tensors(large.bounds.shapes, 0))
    network.eval()
    perfect = lambda rows: example.wanted.float()  # noqa: E731
    network.forward = perfect  # type: ignore[method-assign]
    assert float(error(network, perfect(None), example)) == 0
    assert float(divergence(pair, network, example)) == pytest.approx(0, abs=2e-3)
    network.forward = lambda rows: torch.zeros_like(example.wanted).float()  # type: ignore[method-assign]
    assert float(divergence(pair, network, example)) > 0.1


def test_learning_by_what_is_said(small: VLM, large: VLM, scenes: list[Scene]) -> None:
    """Steps along the gradient of one scene's divergence lower it."""
    pair = Pair(small, large)
    example = pair.example(scenes[1])
    network = Network(_sums(example.rows, example.wanted).tensors(large.bounds.shapes, 4))
    with torch.no_grad():
        network.learned["linear"].mul_(0.5)
    for weight in pair.large.model.parameters():
        weight.requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        losses.append(divergence(pair, network, example, at_once=2))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < 0.9 * float(losses[0].detach())


def _sums(rows: torch.Tensor, wanted: torch.Tensor) -> Regression:
    sums = Regression(rows.shape[1], wanted.shape[1])
    sums.add(rows, wanted)
    return sums


def test_what_is_refused(small: VLM, large: VLM, scenes: list[Scene]) -> None:
    pair = Pair(small, large)
    schedules = Schedule(passes=1), None
    with pytest.raises(InputError, match="at least 20 calibration prompts with pictures, not 7"):
        fit_translator(pair, scenes[:5], scenes[5:7], 8, schedules, {})
    with pytest.raises(InputError, match="same model"):
        Pair(small, small)
    other = kvferry.load("testbed/edge")
    other.__dict__["prompt_fingerprint"] = "of another tokenizer"
    with pytest.raises(FingerprintError, match="split words or pictures differently"):
        Pair(other, large)
    with pytest.raises(InputError, match="holds no picture"):
        pair.example(Scene("words", (), "some context", (("what?", None),)))
    broken = pair.small.model.get_decoder().layers[0].self_attn.v_proj.weight
    kept = broken.detach().clone()
    with torch.no_grad():
        broken[0, 0] = float("nan")
    try:
        with pytest.raises(InputError, match=r"train 0: keys or values hold NaN"):
            pair.example(scenes[0])
    finally:
        with torch.no_grad():
            broken.copy_(kept)


def test_scenes_hold_the_questions_on_the_same_pictures() -> None:
    rows = [("a.png", "one?"), ("a.png", "two?"), ("b.png", "three?")]
    asked = [Asked(f"line {i}", (x,), question, answers=("yes",)) for i, (x, question) in enumerate(rows)]
    found = list(scenes_of([*asked, Asked("line 3", (), "no picture?")]))
    assert [(x.name, x.images, len(x.questions)) for x in found] == [
        ("line 0", ("a.png",), 2),
        ("line 2", ("b.png",), 1),
    ]
    drawn = drawn_scenes("train", 12)
    assert len(drawn) == 12
    assert all(3 <= len(x.questions) <= 11 for x in drawn)
    assert [len(x.images) for x in drawn].count(2) == 1


def test_the_shipped_translator_is_of_the_shipped_pair() -> None:
    from kvferry.models.load import find_folder
    from kvferry.modes.translators import find

    edge, cloud = (kvferry.load(str(find_folder(name))) for name in ("testbed/edge", "testbed/cloud"))
    made = find(edge.fingerprint, cloud.fingerprint)
    assert made.prompts == cloud.prompt_fingerprint == edge.prompt_fingerprint
    assert (width(made.shapes), width(made.target_shapes)) == (512, 768)
    assert made.facts["command"].startswith("kvferry fit translator testbed/edge testbed/cloud")


def test_the_command(tmp_path: Path) -> None:
    small = tmp_path / "small"
    write_folder(build_model(SMALL, 3), small)
    large = write_model(tmp_path / "large")
    pictures = np.random.default_rng(1).integers(0, 255, (21, 48, 48, 3), np.uint8)
    rows = []
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "question": "what colour is the circle?"}))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    out = tmp_path / "a.translator"
    words = [sys.executable, "-m", "kvferry.cli", "fit", "translator", str(small), str(large), "--data"]
    words += [str(tmp_path / "data.jsonl"), "--passes", "3", "--rate", "0.0002", "--hidden", "4", "--dtype", "float32"]
    done = subprocess.run([*words, "--out", str(out), "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["bytes"] == out.stat().st_size
    assert told["Qwen2-VL-2B to 7B"]["multiplications"] == 14336 * 28672 + 4 * (14336 + 28672)
    assert sorted(x.name for x in tmp_path.glob("a.translator*")) == ["a.translator"]
