"""Sparsity, mass, tail, Q2C's separation and harm against numpy, and prompts without pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvferry.analyze.harm import Harm, divergence
from kvferry.analyze.mass import Mass
from kvferry.analyze.observe import ALONE, DROPS, NEEDED, UNSAID
from kvferry.analyze.separability import Apart, chance_of_larger
from kvferry.analyze.sparsity import Sparsity
from kvferry.analyze.tail import SHARES, TOP, Tail, tail_curve
from kvferry.analyze.watch import POST_VISION, QUESTION, VISUAL
from tests.analyze.helpers import observation, text_only


def test_sparsity_is_the_share_that_does_not_survive() -> None:
    seen = [observation(seed=i) for i in range(4)]
    sparsity = Sparsity()
    for x in seen:
        sparsity.add(x)
    each = np.array([[1 - layer.survived / layer.visible for layer in x.attention] for x in seen])
    found = sparsity.result()
    np.testing.assert_allclose(found.mean, each.mean(0))
    np.testing.assert_allclose(found.samples, each[:, :, POST_VISION].mean(1))
    assert 0 < found.mean.min() < found.mean.max() < 1


def test_mass_adds_up_and_even_attention_is_even() -> None:
    mass, even = Mass(), Mass()
    for i in range(3):
        mass.add(observation(seed=i, needs_image=i == 0 or None))
        even.add(observation(seed=i, even=True))
    found, flat = mass.result(), even.result()
    np.testing.assert_allclose(found.mean.sum(-1), 1, rtol=1e-5)
    assert found.samples[:, 0].tolist() == [NEEDED, UNSAID, UNSAID]
    np.testing.assert_allclose(found.samples[:, 1].mean(), found.mean[:, QUESTION, 0].mean())
    np.testing.assert_allclose(flat.entropy[:, :2], 1, rtol=1e-5)
    np.testing.assert_allclose(flat.mean[:, QUESTION, 0], flat.even[QUESTION], rtol=0.01)
    assert (found.entropy[:, QUESTION] < 0.95).all()


def test_even_attention_has_no_tail() -> None:
    tail = Tail()
    tail.add(observation(even=True))
    found = tail.result()
    np.testing.assert_allclose(found.visual, np.tile(SHARES, (3, 1)), atol=1e-6)
    assert found.samples[0] == pytest.approx(SHARES[TOP], abs=1e-6)


def test_tail_curve() -> None:
    curve = tail_curve(np.array([1.0, 6.0, 3.0, 0.0]))
    assert curve[[0, 25, 50, 75, 100]] == pytest.approx([0, 0.6, 0.9, 1, 1])
    assert curve[13] == pytest.approx(0.6 * 13 / 25)
    assert np.isnan(tail_curve(np.zeros(3))).all()
    assert np.isnan(tail_curve(np.zeros(0))).all()


def test_chance_of_larger_counts_pairs() -> None:
    a, b = np.array([1.0, 2.0, 2.0, 5.0]), np.array([2.0, 0.0, 5.0])
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert chance_of_larger(a, b) == pytest.approx(np.mean(pairs))


def test_apart_looks_at_what_q2c_ranks() -> None:
    seen = observation()
    scores, prompt = seen.attention[-1].columns[QUESTION], seen.cache.layout
    asked = np.flatnonzero(prompt.question)[-1]
    text = [scores[i] for i in range(4, asked + 1) if not prompt.visual[i]]
    visual = [scores[i] for i in range(4, asked + 1) if prompt.visual[i]]
    apart = Apart()
    apart.add(seen)
    assert apart.result().samples[0] == pytest.approx(np.mean([x > y for x in text for y in visual]))


def test_harm_is_divergence_and_agreement() -> None:
    logits = torch.randn(4, 9)
    p = logits.double().softmax(-1).numpy()
    expected = [(p[0] * np.log(p[0] / q)).sum() for q in p[1:]]
    np.testing.assert_allclose(divergence(logits), expected, rtol=1e-6)
    assert divergence(torch.ones(2, 5)) == pytest.approx([0])
    harm = Harm()
    for i, needs in enumerate((True, False, None)):
        harm.add(observation(seed=i, needs_image=needs, logits=torch.eye(11)[[3, 3, 4, 3, 4, 3]]))
    found = harm.result()
    assert found.samples[:, 0].tolist() == [NEEDED, ALONE, UNSAID]
    assert found.unchanged.tolist() == [1, 0, 1, 0, 1]
    assert (found.divergence > 0).tolist() == [False, True, False, True, False]
    assert found.samples.shape == (3, 1 + 2 * len(DROPS))


def test_prompts_without_pictures_have_text_only() -> None:
    measurements = (Sparsity(), Mass(), Tail(), Apart(), Harm())
    for x in measurements:
        x.add(text_only())
    sparsity, mass, tail, apart, harm = (x.result() for x in measurements)
    for values in (sparsity.mean, mass.mean):
        assert np.isnan(values[..., 0]).all()
        assert np.isnan(values[:, VISUAL]).all()
        assert np.isfinite(values[:, QUESTION, 1]).all()
    assert np.isnan(tail.visual).all()
    assert np.isfinite(tail.text).all()
    assert len(apart.samples) == len(harm.samples) == len(mass.samples) == len(tail.samples) == 0
