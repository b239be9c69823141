"""Shares of energy with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvferry.analyze.energy import Energy, top_energy
from tests.analyze.helpers import observation


def test_known_shares() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.0]).diag()
    assert top_energy(values, 0.25) == pytest.approx(9 / 14)
    # 30 % of four: the first whole, and a fifth of the second.
    assert top_energy(values, 0.3) == pytest.approx((9 + 0.2 * 4) / 14)
    assert top_energy(values, 1.0) == pytest.approx(1)
    assert top_energy(torch.linalg.qr(torch.randn(40, 40))[0]) == pytest.approx(0.05)
    assert np.isfinite(top_energy(torch.zeros(2, 3, 4))).all()


def test_whole_layers_of_every_prompt() -> None:
    seen, energy = observation(), Energy()
    energy.add(seen)
    energy.add(observation(seed=1))
    found = energy.result()
    assert (found.mean.shape, found.samples.shape) == ((3, 3), (2, 3))
    squares = np.linalg.svd(seen.cache.layers[1].values.transpose(0, 1).flatten(1).double(), compute_uv=False) ** 2
    one = Energy()
    one.add(seen)
    assert one.result().mean[1, 2] == pytest.approx(0.05 * len(squares) * squares[0] / squares.sum())
    np.testing.assert_allclose(found.samples.mean(0), found.mean.mean(0))
