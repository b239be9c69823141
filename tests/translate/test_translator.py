"""A translator as numbers and as a file, and text that is read on top of what it gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kvferry import VLM, FingerprintError, InputError
from kvferry.errors import CorruptError, UnsupportedModelError
from kvferry.models.steps import Pace, finished
from kvferry.models.translated import Asking, answer_logits, read_on, stretches
from kvferry.modes.translators import add, find
from kvferry.selection.base import Selection
from kvferry.translator import layers_of, read, rows_of
from tests.translate.conftest import identity, random_translator

QUESTION = "what colour is the circle?"


def visual_rows(vlm: VLM, images: list[object], question: str | None) -> tuple[object, torch.Tensor, torch.Tensor]:
    cache = vlm.prefill(images, question).cache
    index = torch.from_numpy(np.flatnonzero(cache.layout.visual[: cache.length]))
    where = torch.from_numpy(cache.layout.positions[:, index.numpy()].astype(np.int64))
    return cache, index, where


def test_rows_and_layers_are_each_others_inverse(large: VLM, picture: Path) -> None:
    cache, index, where = visual_rows(large, [picture], QUESTION)
    layers = [x.take(index.expand(x.heads, -1)) for x in cache]
    rows = rows_of(layers, large.rotary, where)
    assert rows.shape == (len(index), 2 * 2 * 2 * 32)
    for (keys, values), layer in zip(layers_of(rows, large.bounds.shapes, large.rotary, where), layers, strict=True):
        torch.testing.assert_close(keys, layer.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, layer.values)


def test_the_formula(small: VLM, large: VLM) -> None:
    made = random_translator(small, large)
    t = {name: x.double().numpy() for name, x in made.tensors.items()}
    x = np.random.default_rng(1).normal(size=(5, len(t["mean_in"])))
    z = (x - t["mean_in"]) / t["scale_in"]
    h = z @ t["into"] + t["into_offset"]
    from scipy.special import erf

    gelu = h * 0.5 * (1 + erf(h / np.sqrt(2)))
    wanted = (z @ t["linear"] + t["offset"] + gelu @ t["out"]) * t["scale_out"] + t["mean_out"]
    np.testing.assert_allclose(made.rows(torch.from_numpy(x).float()).numpy(), wanted, rtol=1e-4, atol=1e-4)
    p, q = len(t["mean_in"]), len(t["mean_out"])
    assert (p, q, made.multiplications) == (3 * 2 * 32, 256, p * q + 8 * (p + q))


def test_a_file_comes_back(small: VLM, large: VLM, tmp_path: Path) -> None:
    made = random_translator(small, large)
    (tmp_path / "a.translator").write_bytes(made.to_bytes())
    back = read(tmp_path / "a.translator")
    assert (back.source, back.target, back.prompts) == (made.source, made.target, made.prompts)
    assert (back.shapes, back.target_shapes, back.facts) == (made.shapes, made.target_shapes, made.facts)
    assert len(back.digest) == 32
    for name, x in made.tensors.items():
        torch.testing.assert_close(back.tensors[name], x, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(back.rotary, made.rotary, strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.sections == theirs.sections
        torch.testing.assert_close(mine.inv_freq, theirs.inv_freq)


def test_files_that_are_none(small: VLM, large: VLM, tmp_path: Path) -> None:
    path = tmp_path / "b.translator"
    with pytest.raises(InputError, match="is no translator"):
        read(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"is no translator.*fit translator"):
        read(path)
    with pytest.raises(InputError, match="it is a transform profile"):
        read(Path("testbed/edge/transform.profile"))
    broken = random_translator(small, large)
    broken.tensors["linear"][0, 0] = float("nan")
    path.write_bytes(broken.to_bytes())
    with pytest.raises(InputError, match="NaN"):
        read(path)
    made = random_translator(small, large)
    with pytest.raises(InputError, match="does not hold"):
        replace(made, tensors=made.tensors | {"offset": torch.zeros(3)})
    with pytest.raises(UnsupportedModelError, match="fixed rotation"):
        replace(made, rotary=(None, *made.rotary[1:]))


def test_another_pair_is_refused_by_name(small: VLM, large: VLM, tmp_path: Path) -> None:
    path = tmp_path / "c.translator"
    path.write_bytes(random_translator(small, large).to_bytes())
    with pytest.raises(FingerprintError, match=rf"into model {large.fingerprint[:12]}.*{small.name}"):
        add(path, small)
    path.write_bytes(replace(random_translator(small, large), prompts="00").to_bytes())
    with pytest.raises(FingerprintError, match="tokenizer"):
        add(path, large)
    with pytest.raises(FingerprintError, match="no translator from model 1234"):
        find("1234", large.fingerprint)


def test_nothing_that_is_no_number_comes_out(small: VLM, large: VLM, picture: Path) -> None:
    made = random_translator(small, large)
    cache, index, _ = visual_rows(small, [picture], QUESTION)
    layers = [x.take(index.expand(x.heads, -1)) for x in cache]
    layers[0].values[0, 0, 0] = float("nan")
    with pytest.raises(CorruptError, match="no numbers"):
        made(layers, cache.layout, large.rotary, index)


@pytest.mark.parametrize("question", [QUESTION, None])
@pytest.mark.parametrize("pictures", [1, 2])
def test_text_on_ones_own_visual_tokens_is_ones_own_cache(
    large: VLM, picture: Path, question: str | None, pictures: int
) -> None:
    """Right values: what the model's prefill gives, text and all."""
    images = [picture, Image.new("RGB", (96, 64), "red")][:pictures]
    cache, index, _ = visual_rows(large, images, question)
    layers = [x.take(index.expand(x.heads, -1)) for x in cache]
    pairs = identity(large)(layers, cache.layout, large.rotary, index)
    found = finished(read_on(large, cache.layout, cache.length, pairs, index, Pace()))
    assert (found.length, found.fingerprint) == (cache.length, cache.fingerprint)
    for mine, theirs in zip(found, cache, strict=True):
        torch.testing.assert_close(mine.positions, theirs.positions)
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-3, atol=1e-4)
    asked = None if question else QUESTION
    assert large.answer(found, asked) == large.answer(cache, asked)


def test_evicted_tokens_are_absent(large: VLM, picture: Path) -> None:
    """As if the model had read the prompt without ever seeing them, which construction-time eviction is."""
    prefilled = large.prefill([picture], QUESTION)
    cache = prefilled.cache
    visual = cache.layout.visual[: cache.length]
    keep = ~visual | (np.arange(cache.length) % 3 == 0)
    where = tuple(torch.from_numpy(np.flatnonzero(keep)).expand(x.heads, -1).contiguous() for x in cache)
    selection = Selection(where, tuple(torch.ones_like(x, dtype=torch.float32) for x in where))
    wanted = large.prefill([picture], QUESTION, construct=selection).cache
    index = torch.from_numpy(np.flatnonzero(keep & visual))
    some = [x.take(index.expand(x.heads, -1)) for x in cache]
    # the pass behind `wanted` hides the dropped from visual tokens too: give those of that pass
    there = [x.take(torch.searchsorted(x.positions[0], index).expand(x.heads, -1)) for x in wanted]
    assert not torch.allclose(some[1].keys, there[1].keys)
    pairs = [(x.keys, x.values) for x in there]
    found = finished(read_on(large, cache.layout, cache.length, pairs, index, Pace()))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.positions, theirs.positions)
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-3, atol=1e-4)


def test_many_questions_in_one_pass_say_what_each_says_alone(large: VLM, picture: Path) -> None:
    cache, index, where = visual_rows(large, [picture], None)
    rows = rows_of([x.take(index.expand(x.heads, -1)) for x in cache], large.rotary, where)
    rows.requires_grad_()
    questions = (QUESTION, "how many shapes are there?")
    asked = [
        Asking(large.prompt_of([picture], x)[1], answer) for x, answer in zip(questions, ((9, 11), (12,)), strict=True)
    ]
    for weight in large.model.parameters():
        weight.requires_grad_(False)
    told = answer_logits(large.model, layers_of(rows, large.bounds.shapes, large.rotary, where), index, asked)
    for one, logits, question in zip(asked, told, questions, strict=True):
        alone = large.score(large.prefill([picture], question).cache, one.answer)
        torch.testing.assert_close(logits.detach(), alone, rtol=1e-3, atol=1e-3)
    sum(x.sum() for x in told).backward()  # type: ignore[union-attr]
    assert rows.grad is not None
    assert bool((rows.grad.abs().sum(1) > 0).all())


def test_stretches() -> None:
    visual = np.array([0, 0, 1, 1, 1, 0, 1], bool)
    assert list(stretches(visual)) == [(0, 2, False), (2, 5, True), (5, 6, False), (6, 7, True)]
    assert list(stretches(np.zeros(3, bool))) == [(0, 3, False)]
