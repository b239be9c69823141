"""Ranks with known answers, at equal token counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvferry.analyze.rank import KINDS, Rank, ranks, token_vectors
from tests.analyze.helpers import ROTARY, observation, text_only
from tests.helpers import layout


def test_known_ranks() -> None:
    orthogonal = torch.linalg.qr(torch.randn(12, 12))[0]
    np.testing.assert_allclose(ranks(orthogonal), [12, 11, 12, 12], rtol=1e-6)
    np.testing.assert_allclose(ranks(torch.outer(torch.randn(9), torch.randn(5))), 1, rtol=1e-6)
    values = torch.tensor([3.0, 2.0, 1.0])
    share = values / 6
    effective = float((-share * share.log()).sum().exp())
    # Energies 9, 4 and 1 of 14: 64 %, 93 %, 100 %.
    np.testing.assert_allclose(ranks(values.diag()), [effective, 2, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(ranks(values.diag() * 1e-6), [effective, 2, 3, 3], rtol=1e-4)
    assert np.isfinite(ranks(torch.zeros(3, 4))).all()


def test_vectors_are_the_cache_with_its_heads_side_by_side() -> None:
    seen = observation()
    vectors = token_vectors(seen)
    layer = seen.cache.layers[1]
    assert vectors.shape == (3, 3, seen.cache.length, 16)
    torch.testing.assert_close(vectors[1, 0, 5], layer.keys[:, 5].flatten())
    torch.testing.assert_close(vectors[1, 2, 5], layer.values[:, 5].flatten())
    positions = torch.from_numpy(seen.cache.layout.positions[:, : seen.cache.length])
    torch.testing.assert_close(vectors[1, 1, 5], ROTARY.unrotate(layer.keys, positions)[:, 5].flatten())


def test_as_many_tokens_of_each_modality() -> None:
    """Ten text tokens against 2,000 visual ones of the same distribution give the same rank, not a tenth of it."""
    rank = Rank()
    for seed in range(3):
        rank.add(observation(layout(text_before=2, rows=40, columns=50, question=6, tail=3), seed=seed))
    found = rank.result()
    assert found.tokens == 10
    assert found.pooled_tokens == 30
    assert (found.mean[:, :, 2] <= 10).all()
    np.testing.assert_allclose(found.mean[0, :, 2, 0] / found.mean[0, :, 2, 1], 1, atol=0.06)


def test_one_prompt_against_numpy() -> None:
    seen = observation(layout(rows=3, columns=4, question=6, tail=4))
    rank = Rank()
    rank.add(seen)
    found = rank.result()
    visual = seen.visual
    assert visual.sum() == (~visual).sum() == found.tokens
    for side, tokens in enumerate((visual, ~visual)):
        matrix = seen.cache.layers[2].values[:, torch.from_numpy(tokens)].transpose(0, 1).flatten(1)
        share = np.linalg.svd(matrix.numpy(), compute_uv=False)
        share /= share.sum()
        expected = np.exp(-(share * np.log(share)).sum())
        assert found.mean[0, 2, 2, side] == pytest.approx(expected, rel=1e-5)
        assert found.pooled[0, 2, 2, side] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(found.samples[0], found.mean[0].mean(0))


def test_a_rotation_that_cannot_be_undone_is_left_out() -> None:
    rank = Rank()
    rank.add(replace(observation(), rotary=(None, ROTARY, ROTARY)))
    mean = rank.result().mean[0]
    assert np.isnan(mean[0, KINDS.index("un-rotated keys")]).all()
    assert np.isfinite(mean[1:]).all()
    assert np.isfinite(mean[:, KINDS.index("keys")]).all()


def test_prompts_of_one_modality_count_only_among_themselves() -> None:
    mixed, alone = Rank(), Rank()
    mixed.add(observation(seed=1))
    for rank in (mixed, alone):
        rank.add(text_only(seed=2))
    assert mixed.result().samples.shape == (1, 3, 2)
    found = alone.result()
    assert np.isnan(found.mean[..., 0]).all()
    assert np.isfinite(found.mean[..., 1]).all()
    assert found.tokens == 17
