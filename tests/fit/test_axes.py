"""Principal axes against the exact decomposition, and words in bounded memory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kvferry.fit import word_means
from kvferry.fit.axes import captured, principal_axes
from kvferry.fit.word_means import WordMeans


def rows(n: int, p: int, decay: float, seed: int = 0) -> torch.Tensor:
    """Vectors whose standard deviations fall by ``decay`` from axis to axis."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(n, p)
    turned = torch.linalg.qr(torch.randn(p, rank, generator=generator, dtype=torch.float64)).Q
    size = decay ** torch.arange(rank, dtype=torch.float64)
    return ((torch.randn(n, rank, generator=generator, dtype=torch.float64) * size) @ turned.T).float()


@pytest.mark.parametrize(("n", "p"), [(60, 300), (300, 60), (80, 80), (5, 2000)])
@pytest.mark.parametrize("decay", [0.97, 0.8])
def test_axes_are_those_of_the_singular_value_decomposition(n: int, p: int, decay: float) -> None:
    y = rows(n, p, decay)
    rank = min(32, n, p)
    axes, octaves = principal_axes(y, 32)
    assert (axes.shape, axes.dtype, octaves.dtype) == ((p, rank), torch.float32, torch.int16)
    torch.testing.assert_close(axes.T @ axes, torch.eye(rank), atol=1e-5, rtol=0)
    _, size, exact = torch.linalg.svd(y.double(), full_matrices=False)
    best = float(size[:rank].square().sum() / size.square().sum())
    assert captured(y, axes) == pytest.approx(best, abs=1e-6)
    clear = size > 1e-4 * size[0]
    alike = (exact[:rank].double() @ axes.double()).diagonal().abs()[clear[:rank]]
    assert float(alike.min()) > 1 - 1e-4
    deviation = 2 ** (octaves.float() / 8)
    wanted = size[:rank].float() / n**0.5
    assert bool(((deviation / wanted).log2().abs() < 0.07)[wanted > 2.0**-19].all())


@pytest.mark.parametrize("y", [torch.zeros(1, 40), torch.zeros(3, 40), torch.ones(7, 40), torch.zeros(40, 7)])
def test_axes_of_vectors_that_say_nothing_are_orthonormal(y: torch.Tensor) -> None:
    axes, _ = principal_axes(y, 16)
    rank = min(16, *y.shape)
    assert axes.shape == (y.shape[1], rank)
    torch.testing.assert_close(axes.T @ axes, torch.eye(rank), atol=1e-5, rtol=0)
    assert captured(y, axes) == pytest.approx(1.0, abs=1e-6)


def test_frequent_words_are_held_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    width, room = 6, 5
    monkeypatch.setattr(word_means, "MEMORY", 8 * width * room)
    generator = torch.Generator().manual_seed(1)
    frequent = torch.arange(100, 105)
    means, counts = WordMeans(), Counter[int]()
    vectors = torch.randn(400, width, generator=generator)
    for prompt in range(60):
        rare = torch.randint(200, 400, (8,), generator=generator)
        words = torch.cat([rare, frequent, frequent]) if prompt else rare
        counts.update(words.tolist())
        means.add(vectors[words], words)
        assert len(means._held) <= room
    assert means.counts == counts
    known, found = means.means(width)
    assert known.tolist() == frequent.tolist(), "what came first was rare, and gave way"
    torch.testing.assert_close(found, vectors[frequent])


def test_with_room_for_all_words_every_occurrence_counts() -> None:
    means = WordMeans()
    vectors = torch.arange(24.0).view(12, 2)
    means.add(vectors, torch.tensor([3, 1, 3, 3, 3, 3, 3, 3, 3, 1, 1, 2]))
    known, found = means.means(2)
    assert known.tolist() == [3]
    torch.testing.assert_close(found[0], vectors[[0, 2, 3, 4, 5, 6, 7, 8]].mean(0))
    means.add(vectors, torch.ones(12, dtype=torch.int64))
    assert means.means(2)[0].tolist() == [1, 3]
