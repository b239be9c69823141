"""Kept sets against Python's own sets, and who stays."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from kvferry.analyze.observe import FRACTIONS, Observation
from kvferry.analyze.overlap import Overlap, likeness, members
from kvferry.analyze.survivors import DRAWN_FRACTION, DRAWN_PROMPTS, Survivors
from kvferry.errors import InputError
from kvferry.recipe import Recipe
from kvferry.selection import Selection
from tests.analyze.helpers import SCORERS, observation, text_only
from tests.helpers import layout


def kept(seen: Observation, scorer: int, layer: int, head: int, fraction: float = 0.5) -> set[int]:
    return set(seen.choices[SCORERS[scorer]][fraction].positions[layer][head].tolist())


def alike(pairs: list[tuple[set[int], set[int]]]) -> list[float]:
    overlap = [len(a & b) / len(a) for a, b in pairs]
    jaccard = [len(a & b) / len(a | b) for a, b in pairs]
    return [float(np.mean(overlap)), float(np.mean(jaccard))]


def test_overlap_against_sets() -> None:
    seen = observation(seed=1)
    other = observation(layout(question=7), seed=2, layers=2)
    overlap = Overlap(SCORERS)
    overlap.add(seen, other)
    found, half = overlap.result(), FRACTIONS.index(0.5)
    same = [(kept(seen, 0, layer, head), kept(seen, 1, layer, head)) for layer, head in product(range(3), range(2))]
    np.testing.assert_allclose(found.between_scorers[:, half, 0, 1], alike(same))
    np.testing.assert_allclose(found.between_scorers[:, half, 0, 0], 1)
    layers = [(kept(seen, 1, 0, a), kept(seen, 1, 2, b)) for a, b in product(range(2), range(2))]
    np.testing.assert_allclose(found.between_layers[:, half, 1, 0, 2], alike(layers))
    places = list(product(range(3), range(2), range(2), range(2)))
    models = [(kept(seen, 0, i, a), kept(other, 0, j, b)) for i, a, j, b in places]
    np.testing.assert_allclose(found.between_models[:, half, 0], alike(models))
    np.testing.assert_allclose(found.samples[0], found.between_models)


def test_heads_that_keep_differently_many_are_compared_too() -> None:
    positions = (torch.tensor([[0, 2, 5, 1, 2]]), torch.tensor([[0, 3], [1, 3]]))
    ragged = Selection(positions, tuple(x.float() for x in positions), ((3, 2), ()))
    found = members(ragged, 6)
    assert [[set(np.flatnonzero(head).tolist()) for head in layer] for layer in found] == [
        [{0, 2, 5}, {1, 2}],
        [{0, 3}, {1, 3}],
    ]
    overlap, jaccard = likeness(found[0], found[0])
    np.testing.assert_allclose(overlap, [[1, 1 / 2], [1 / 2, 1]])
    np.testing.assert_allclose(jaccard, [[1, 1 / 4], [1 / 4, 1]])
    seen = observation(seed=1)
    chosen = Recipe.parse("knorm@0.5,budget=head").select(seen.cache)
    assert any(chosen.counts)
    overlap = Overlap(("one",))
    overlap.add(replace(seen, choices={"one": dict.fromkeys(FRACTIONS, chosen)}))
    assert 0 < overlap.result().between_layers.min() < 1


def test_streaming_is_the_mean_over_prompts() -> None:
    one_by_one = []
    together = Overlap(SCORERS)
    for seed in range(3):
        alone = Overlap(SCORERS)
        for overlap in (alone, together):
            overlap.add(observation(seed=seed))
        one_by_one.append(alone.result().between_layers)
    np.testing.assert_allclose(together.result().between_layers, np.mean(one_by_one, axis=0))
    assert np.isnan(together.result().between_models).all()


@pytest.mark.parametrize(
    ("other", "what"), [(layout(rows=5, columns=4), "patch grid"), (layout(question=9), "tokenizer and template")]
)
def test_models_that_read_differently_are_not_compared(other: object, what: str) -> None:
    with pytest.raises(InputError, match=f"sample 0.*{what}"):
        Overlap(SCORERS).add(observation(), observation(other))  # type: ignore[arg-type]


def test_survivors_by_modality() -> None:
    survivors = Survivors(SCORERS)
    seen = observation()
    survivors.add(seen)
    visual = set(np.flatnonzero(seen.visual).tolist())
    share = np.mean([len(kept(seen, 1, i, h) & visual) / len(visual) for i, h in product(range(3), range(2))])
    assert survivors.result().kept[1, FRACTIONS.index(0.5), 0] == pytest.approx(share)
    assert survivors.result().drawn == ()


def test_only_the_first_pictures_with_a_grid_are_drawn() -> None:
    survivors = Survivors(SCORERS)
    flat = replace(layout(), grids=())
    survivors.add(observation(flat, picture=True))
    survivors.add(text_only())
    for seed in range(DRAWN_PROMPTS + 2):
        survivors.add(observation(seed=seed, picture=True))
    drawn = survivors.result().drawn
    assert len(drawn) == DRAWN_PROMPTS
    assert drawn[0].shares["one"].shape == (4, 5)
    seen = observation(seed=0)
    cell = int(np.flatnonzero(seen.visual)[7])
    expected = np.mean([cell in kept(seen, 0, i, h, DRAWN_FRACTION) for i, h in product(range(3), range(2))])
    assert drawn[0].shares["one"].ravel()[7] == pytest.approx(expected)
