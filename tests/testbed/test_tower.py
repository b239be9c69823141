"""The faster tower is the same tower; guidance looks where the neighbour is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvferry.testbed import tower as towers
from kvferry.testbed.build import SIZES, build_model
from kvferry.testbed.pixels import patches
from kvferry.testbed.render import render
from kvferry.testbed.scenes import LATTICE, Scene, Thing, draw_scene
from kvferry.testbed.tower import PATCHES, Glance, middle, pick_size, scene_grids, speed_up


@pytest.mark.parametrize("sizes", [[(64, 64)] * 5, [(96, 64), (64, 96)], [(64, 64), (96, 96)]])
def test_the_fast_tower_is_the_plain_tower(sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pictures of one size, turned, and of two sizes; with groups of two pictures attended at a time."""
    monkeypatch.setattr(towers, "IN_CACHE", 2 * 64**2)
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, width, height) for width, height in sizes]
    pixels, grid = torch.cat([patches([render(scene)]) for scene in scenes]), scene_grids(scenes)
    tower = build_model(SIZES["edge"]).model.visual
    with torch.no_grad():
        plain = middle(tower, pixels, grid)
        speed_up(tower)
        torch.testing.assert_close(middle(tower, pixels, grid), plain, atol=2e-5, rtol=1e-4)


def _row_of(*places: tuple[float, float]) -> Scene:
    things = tuple(Thing("red", "circle", "", x, y, 30, 0) for x, y in places)
    return Scene(96, 64, things, (), 0)


def test_a_glance_goes_from_a_thing_to_its_neighbour() -> None:
    scenes = [_row_of((24, 24), (72, 24)), _row_of((24, 24))]
    glance = Glance.at(scenes)
    assert glance is not None
    picture, head, patch = (part.tolist() for part in glance.rows)
    left, right = 6 * 1 + 1, 6 * 1 + 4
    assert set(picture) == {0}
    seen = {
        (h, p // PATCHES): sorted({int(c) // PATCHES for c in wanted.nonzero()})
        for h, p, wanted in zip(head, patch, glance.wanted, strict=True)
    }
    assert seen == {(0, right): [left], (1, left): [right]}
    assert Glance.at([_row_of((24, 24))]) is None


def test_attention_on_the_neighbour_is_not_astray() -> None:
    glance = Glance.at([_row_of((24, 24), (72, 24))])
    assert glance is not None
    query = torch.zeros(1, 2, 24 * PATCHES, 4)
    glance.look(query, torch.zeros_like(query), 1.0)
    even = float(glance.astray)
    assert even == pytest.approx(np.log(24), abs=1e-4)
    key = torch.zeros_like(query)
    for (_, head, patch), wanted in zip(zip(*glance.rows, strict=True), glance.wanted, strict=True):
        query[0, head, patch] = 5
        key[0, head, wanted] = 5
    glance.look(query, key, 1.0)
    assert float(glance.astray) < 0.01 < even


def test_lessons_begin_small_and_tidy() -> None:
    rng = np.random.default_rng(0)
    assert [pick_size(rng, progress)[3] for progress in (0.0, 0.1, 0.2, 0.29, 0.31, 0.99)] == [8, 4, 2, 1, 1, LATTICE]
