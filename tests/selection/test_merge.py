"""LOOK-M's merging, by hand and on random caches."""

from __future__ import annotations

import pytest
import torch

from kvferry.cache import KVCache, LayerCache
from kvferry.recipe import Recipe, compress, decompress
from kvferry.selection import Selection, evict
from kvferry.selection.merge import LookM
from tests.helpers import cache as random_cache
from tests.helpers import layout

PROMPT = layout(text_before=1, rows=1, columns=3, question=1, tail=1)
EAST, NORTH = [1.0, 0.0], [0.0, 1.0]


def by_hand() -> tuple[KVCache, KVCache]:
    """Text keeps 0 and 4; of the picture 1 stays (north), 2 (nearly east) and 3 (north) go."""
    keys = torch.tensor([[EAST, NORTH, [2.0, 1.0], [0.0, 3.0], [1.0, -1.0]]])
    values = torch.arange(10.0).view(1, 5, 2)
    full = KVCache((LayerCache(keys, values, torch.arange(5)[None]),), PROMPT, 5, fingerprint="")
    kept = torch.tensor([[0, 1, 4]])
    return full, evict(full, Selection((kept,), (torch.zeros(1, 3),)))


@pytest.mark.parametrize(
    ("kind", "first"),
    [("averaged", [1.5, 0.5]), ("pivotal", [1.25, 0.25]), ("weighted", [(1 + 2 * 0.8944) / 2, 0.8944 / 2])],
)
def test_what_goes_is_averaged_into_its_nearest(kind: str, first: list[float]) -> None:
    full, kept = by_hand()
    (merged,) = LookM(kind).merge(full, kept)  # type: ignore[arg-type]
    north = {"averaged": 2.0, "pivotal": 1.5, "weighted": 2.0}[kind]
    assert torch.allclose(merged.keys[0], torch.tensor([first, [0.0, north], [1.0, -1.0]]), atol=1e-4)
    if kind == "averaged":
        assert merged.values[0].tolist() == [[2.0, 3.0], [4.0, 5.0], [8.0, 9.0]]
    assert torch.equal(merged.positions, kept.layers[0].positions)


def test_nothing_evicted_nothing_changed() -> None:
    for cache in (random_cache(), random_cache(layout(rows=0, columns=0, question=20))):
        fraction = 1.0 if cache.layout.visual.any() else 0.5
        plain, merged = (Recipe.parse(f"knorm@{fraction}{x}").keep(cache) for x in ("", ",merge=lookm"))
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(plain, merged, strict=True))


@pytest.mark.parametrize("recipe", ["knorm@0.3", "knorm@0.3,budget=head", "none"])
def test_merging_keeps_positions_sizes_and_the_mean(recipe: str) -> None:
    cache = random_cache(dtype=torch.float32)
    plain = Recipe.parse(recipe).keep(cache)
    merged = Recipe.parse(recipe + ",merge=lookm").keep(cache)
    assert merged.nbytes == plain.nbytes
    for before, after in zip(plain, merged, strict=True):
        assert torch.equal(before.positions, after.positions)
        assert before.counts == after.counts
        assert not torch.equal(before.values, after.values)
        assert after.values.abs().max() <= cache.layers[0].values.abs().max() + 2
    again = decompress(compress(cache, recipe + ",merge=lookm|bf16"))
    assert torch.equal(again.layers[0].keys, merged.layers[0].keys.bfloat16())
