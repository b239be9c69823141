"""From questions to a profile, on an untrained model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kvferry.analyze.source import Asked, drawn_questions
from kvferry.cli.app import app
from kvferry.codecs import Transform
from kvferry.codecs import profile as profiles
from kvferry.codecs.profile import blockwise
from kvferry.errors import InputError
from kvferry.fit import transform, word_means
from kvferry.fit.kvtc import PlainCalibration
from kvferry.fit.transform import Calibration
from kvferry.models import VLM, load
from kvferry.models.sensitivity import logit_gradients
from kvferry.recipe import Recipe, compress, decompress
from kvferry.testbed import samples


def test_gradients_foretell_how_logits_move(folder: Path) -> None:
    vlm = load(folder)
    vlm.model.float()
    (sample,) = samples("calibration", 1)
    cache = vlm.prefill(sample.images, sample.question).cache
    probe = torch.Generator().manual_seed(3)
    keys, values = logit_gradients(vlm, cache, [7], 1, probe)
    assert not any(x.keys.requires_grad or x.values.requires_grad for x in cache)
    z = torch.randn(2, vlm.model.config.text_config.vocab_size, generator=torch.Generator().manual_seed(3))

    def projected(step: float) -> float:
        moved = [
            type(x)(x.keys.float() + step * k, x.values.float() + step * v, x.positions)
            for x, k, v in zip(cache, keys[0], values[0], strict=True)
        ]
        logits = vlm.score(type(cache)(tuple(moved), cache.layout, cache.length, cache.fingerprint), [7])
        return float((z * (logits - logits.mean(-1, keepdim=True))).sum()) / 2**0.5

    size = float(keys.pow(2).sum() + values.pow(2).sum())
    step = 0.05 / size**0.5
    assert (projected(step) - projected(-step)) / (2 * step) == pytest.approx(size, rel=0.05)


def test_a_profile_describes_what_it_saw(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_means, "ENOUGH", 2)
    calibration = Calibration(vlm, Recipe.parse("full"), rank=200, probes=2)
    asked = list(drawn_questions("calibration", 6).each())
    for one in asked:
        calibration.add(one)
    path = tmp_path / "p.profile"
    path.write_bytes(calibration.profile({"n": 6}).to_bytes())
    profile, _ = profiles.read(path)
    assert profile.fingerprint == vlm.fingerprint
    facts = profile.facts
    assert facts["n"] == 6
    assert facts["words"]["with_means"] == len(profile.words) < facts["words"]["seen"]
    assert 0.9 < facts["captured"]["visual"] <= 1.0
    assert 0.9 < facts["captured"]["text"] <= 1.0
    for basis in (profile.visual, profile.text):
        axes = basis.vectors
        torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1]), atol=5e-3, rtol=0)
        assert bool((basis.octaves[:40].diff() <= 0).all())
        x = torch.randn(3, len(basis.mean))
        unweighted = blockwise(torch.linalg.inv(basis.weight), blockwise(basis.weight, x))
        torch.testing.assert_close(unweighted, x, atol=1e-2, rtol=1e-2)
    cache = vlm.prefill(asked[0].images, asked[0].question).cache
    first = cache.layers[0].keys[:, 0].float()
    decoded = decompress(compress(cache, f"full|transform:40@{path}"))
    torch.testing.assert_close(decoded.layers[0].keys[:, 0].float(), first, atol=0.02, rtol=0.02)


def test_memory_is_bounded(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform, "MOST", 50)
    calibration = Calibration(vlm, Recipe.parse("full"), rank=8, probes=1)
    for one in drawn_questions("calibration", 2).each():
        calibration.add(one)
    assert len(calibration._vectors[True].rows) == 50
    assert calibration._vectors[True].seen > 100
    assert calibration.profile({}).visual.vectors.shape[1] == 8


def test_nothing_is_not_enough(vlm: VLM) -> None:
    with pytest.raises(InputError, match="give it some"):
        Calibration(vlm, Recipe.parse("full"), rank=8, probes=1).profile({})


def asked(question: str, pictures: int = 0, context: str | None = None) -> Asked:
    images = [Image.new("RGB", (96, 96), colour) for colour in ("red", "navy", "gold")]
    return Asked("one", tuple(images[:pictures]), question, context=context)


def test_text_alone_makes_a_profile_that_refuses_pictures(vlm: VLM, tmp_path: Path) -> None:
    """Issue 13: it crashed over a reshape of 0 elements."""
    calibration = Calibration(vlm, Recipe.parse("full"), rank=8, probes=1)
    for text in ("what colour is the circle?", "how many shapes are there?", "red"):
        calibration.add(asked(text))
    made = calibration.profile({})
    path = tmp_path / "text.profile"
    path.write_bytes(made.to_bytes())
    profile, _ = profiles.read(path)
    assert (profile.visual.vectors.shape[1], profile.text.vectors.shape[1]) == (0, 8)
    assert set(profile.facts["captured"]) == {"text"}
    least, _ = Transform.reachable(profile)
    words = vlm.prefill((), "what colour is the circle?").cache
    blob = compress(words, f"full|transform:{math.ceil(least)}@{path}")
    assert decompress(blob).kept == words.kept
    with pytest.raises(InputError, match="calibrated without visual tokens"):
        compress(vlm.prefill(asked("", 1).images, "what is it?").cache, f"full|transform:{math.ceil(least)}@{path}")


def test_prompts_of_every_shape_calibrate(vlm: VLM, tmp_path: Path) -> None:
    """Two pictures, one word, a context, fewer tokens than axes; a selection that keeps one token."""
    shapes = [asked("what colour?", 2), asked("a"), asked("is it red?", 1, context="the note says red")]
    for recipe in ("full", "knorm@0.001,budget=shared", "none"):
        plan = Recipe.parse(recipe)
        calibration, plain = Calibration(vlm, plan, 4096, 1), PlainCalibration(vlm, plan, 9)
        for one in shapes:
            calibration.add(one)
            plain.add(one)
        path = tmp_path / "p.profile"
        path.write_bytes(calibration.profile({}).to_bytes())
        text = profiles.read(path)[0].text
        assert text.vectors.shape[1] == min(len(calibration._vectors[False].rows), calibration.width)
        torch.testing.assert_close(text.vectors.T @ text.vectors, torch.eye(text.vectors.shape[1]), atol=5e-3, rtol=0)
        cache = vlm.prefill((), "what colour is the circle?").cache
        assert decompress(compress(cache, f"full|transform:100@{path}")).kept == cache.kept
        if recipe == "knorm@0.001,budget=shared":
            with pytest.raises(InputError, match="more than the first 4 tokens"):
                plain.profile({})
        else:
            path.write_bytes(plain.profile({}).to_bytes())
            assert decompress(compress(cache, f"full|kvtc:100@{path}")).kept == cache.kept


def test_a_context_counts(vlm: VLM) -> None:
    calibration = Calibration(vlm, Recipe.parse("full"), rank=8, probes=1)
    calibration.add(asked("is it red?", context="note says red blue green"))
    whole = vlm.prefill((), "is it red?", context="note says red blue green").cache
    assert len(calibration._vectors[False].rows) == whole.length > vlm.prefill((), "is it red?").cache.length


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_activations_are_refused_by_name(folder: Path, broken: float) -> None:
    vlm = load(folder)
    vlm.model.get_decoder().layers[1].self_attn.v_proj.weight.data[0, 0] = broken
    for calibration in (Calibration(vlm, Recipe.parse("full"), 8, 1), PlainCalibration(vlm, Recipe.parse("full"), 8)):
        with pytest.raises(InputError, match="NaN or infinity"):
            calibration.add(asked("is it red?"))


@pytest.mark.parametrize(("kind", "codec"), [("transform", "transform:20"), ("kvtc", "kvtc:8")])
def test_the_command(folder: Path, vlm: VLM, tmp_path: Path, kind: str, codec: str) -> None:
    out = tmp_path / "p.profile"
    command = ["calibrate", str(folder), "--kind", kind, "--n", "2", "--probes", "1", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert f"{kind}:" in done.output
    assert "is the finest it reaches" in done.output
    assert "axes capture" in done.output
    profile, _ = profiles.read(out)
    assert (profile.kind, profile.facts["n"]) == (kind, 2)
    (asked,) = drawn_questions("validation", 1).each()
    cache = vlm.prefill(asked.images, asked.question).cache
    decoded = decompress(compress(cache, f"full|{codec}@{out}"))
    keys, exact = (torch.cat([x.keys[:, 4:-8].float() for x in y]) for y in (decoded, cache))
    assert float((keys - exact).square().mean()) < 0.3 * float(exact.square().mean())


def test_plain_axes_are_those_of_the_caches(vlm: VLM) -> None:
    calibration = PlainCalibration(vlm, Recipe.parse("full"), rank=24)
    with pytest.raises(InputError, match="give it some"):
        calibration.profile({})
    for one in drawn_questions("calibration", 3).each():
        calibration.add(one)
    rows = torch.stack(calibration._vectors.rows)
    axes = calibration.profile({}).values
    values = rows.view(len(rows), -1, 2, vlm.head_dim)[:, :, 1].flatten(1)
    torch.testing.assert_close(axes.mean, values.mean(0))
    spread = (values - axes.mean).square().mean(0).sum()
    assert float((2 ** (axes.octaves.float() / 4)).sum()) == pytest.approx(float(spread), rel=0.2)
    assert bool((axes.octaves.diff() <= 0).all())
