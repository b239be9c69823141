"""The break-even map: the house's worked figures, and what must hold everywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvferry.errors import InputError
from kvferry.policy import Context, OperatingPoint, PointTable, crossover
from kvferry.policy.break_even import SHAPES, Machines, break_even_map, formula_points, is_cache, measured_points
from kvferry.policy.break_even_figure import draw_maps, panels, way_of

MBIT = np.geomspace(1, 10_000, 25)
LOAD = np.array([0.0, 0.5, 0.9, 0.99])
TOKENS = (100, 1_369, 20_000)


def test_the_ratio_beyond_which_a_cache_beats_a_photo_at_any_rate() -> None:
    """A 1024 x 1024 picture, 1,369 tokens, 250 kB: 314 times for Qwen2-VL-7B, 157 for 2B."""
    small, large, _ = SHAPES
    assert large.cache_bytes_per_token == 57_344
    assert large.cache_bytes_per_token * 1_369 == pytest.approx(78.5e6, rel=1e-3)
    assert large.cache_bytes_per_token * 1_369 / 250e3 == pytest.approx(314, abs=0.1)
    assert small.cache_bytes_per_token * 1_369 / 250e3 == pytest.approx(157, abs=0.1)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("held", [False, True])
def test_the_map_agrees_with_the_crossover_of_its_points(shape, held: bool, tokens: int) -> None:
    machines = Machines()
    points = formula_points(shape, tokens, machines, edge_holds_cache=held)
    _, seconds = break_even_map(points, MBIT, np.array([0.9]), machines.rtt_seconds)
    image, _, *caches = points
    context = Context(86_400, machines.rtt_seconds, prefill_queue_seconds=9 * image.cloud_seconds)
    for place, cache in enumerate(caches, 2):
        found = crossover(cache, image, context)
        faster = seconds[0, :, place] < seconds[0, :, 0]
        assert found.when in ("above", "never")
        assert np.array_equal(faster, (found.bits_per_second or np.inf) < MBIT * 1e6)


def test_load_and_a_cache_in_hand_only_help_the_cache() -> None:
    for shape in SHAPES:
        rows = []
        for held in (False, True):
            points = formula_points(shape, 1_369, Machines(), edge_holds_cache=held)
            best, _ = break_even_map(points, MBIT, LOAD)
            rows.append(np.array([is_cache(x) for x in points])[best].mean(1))
        apart, with_cache = rows
        assert (np.diff(apart) >= 0).all()
        assert (with_cache >= apart).all()
        assert apart[0] == 0, "an idle cloud with pixels at hand prefills sooner than a device eight times slower"
        assert with_cache[-1] > 0.3


def test_the_mildest_cache_that_wins_is_taken() -> None:
    points = formula_points(SHAPES[1], 1_369, Machines(), edge_holds_cache=True)
    best, seconds = break_even_map(points, MBIT, LOAD)
    caches = [i for i, point in enumerate(points) if is_cache(point)]
    for row, column in np.ndindex(best.shape):
        others = min(seconds[row, column, :2])
        winners = [i for i in caches if seconds[row, column, i] < others]
        expected = winners[0] if winners else int(seconds[row, column, :2].argmin())
        assert best[row, column] == expected


def test_privacy_leaves_the_rest() -> None:
    points = formula_points(SHAPES[0], 100, Machines())
    rules = frozenset({"no-pixels", "no-embeds"})
    best, seconds = break_even_map(points, MBIT, LOAD, privacy=rules)
    assert np.isinf(seconds[..., :2]).all()
    assert {points[i].mode for i in best.ravel()} == {"kv:full|bf16"}
    with pytest.raises(InputError, match="no point"):
        break_even_map(points[:2], MBIT, LOAD, privacy=rules)


def test_what_cannot_be() -> None:
    points = formula_points(SHAPES[0], 100, Machines())
    for mbit, load in ((MBIT, np.array([1.0])), (MBIT, np.array([-0.1])), (np.array([0.0]), LOAD)):
        with pytest.raises(InputError, match="a map needs"):
            break_even_map(points, mbit, load)
    with pytest.raises(InputError, match="speeds"):
        Machines(edge_flops=0)
    with pytest.raises(InputError, match="visual token"):
        formula_points(SHAPES[0], 0, Machines())


MEASURED = PointTable(
    "a to b",
    (
        OperatingPoint("image", 0.95, 14_000, 0.0, 0.001, 0.001, 0.05, ("pixels",), prefill_seconds=0.04),
        OperatingPoint("image", 0.95, 90, cloud_seconds=0.05, needs=("pixels", "held_picture"), prefill_seconds=0.04),
        OperatingPoint("embeds:int4", 0.95, 13_000, 0.02, 0.001, 0.001, 0.03, ("embeds",), prefill_seconds=0.02),
        OperatingPoint("kv:leaveout@0.1|int4", 0.93, 5_000, 0.04, 0.005, 0.005, 0.01),
        OperatingPoint("kv:full|bf16", 0.96, 330_000, 0.04, 0.005, 0.005, 0.01),
        OperatingPoint("kv:full|transform:80", 0.95, 3_000, 0.04, 0.02, 0.02, 0.01),
        OperatingPoint("kv:none|bf16", 0.2, 20_000, 0.04, 0.005, 0.005, 0.01),
        OperatingPoint("local", 0.96, 0, edge_seconds=0.05),
    ),
)


def test_measured_points() -> None:
    points = measured_points(MEASURED)
    modes = ["kv:full|bf16", "image", "embeds:int4", "kv:full|transform:80"]
    assert [x.mode for x in points] == modes, "largest first; not what answers worse, nor what needs a session"
    unsure = replace(MEASURED.points[3], interval=(0.9, 0.97))
    assert unsure in measured_points(replace(MEASURED, points=(*MEASURED.points[:3], unsure, *MEASURED.points[4:])))
    held = measured_points(MEASURED, edge_holds_cache=True)
    assert [x.edge_seconds for x in held] == [0, 0, 0, 0]
    assert [way_of(x) for x in points] == ["bf16", "image", "embeds", "transform"]
    assert [way_of(x) for x in MEASURED.points[3:5]] == ["kept", "bf16"]
    best, seconds = break_even_map(points, np.array([0.1, 1e6]), np.array([0.0, 0.9]))
    assert points[best[0, 0]].mode == "kv:full|transform:80", "the fewest bytes at a low rate"
    assert points[best[1, 1]].mode == "kv:full|bf16", "no queue at a high one"
    assert seconds[1, 1, 1] - seconds[0, 1, 1] == pytest.approx(9 * 0.04), "only prefill waits"
    for some in (MEASURED.points[:2], MEASURED.points[3:6]):
        with pytest.raises(InputError, match="cache and a picture"):
            measured_points(PointTable("a", some))


def test_the_picture_names_both_answers() -> None:
    rows = panels(SHAPES[1:2], (1_369, 16_384), Machines(), MEASURED)
    figure = draw_maps(rows, MBIT, LOAD, Machines())
    names = [axes.get_title() for axes in figure.axes]
    assert names[:2] == ["Qwen2-VL-7B\n(formula)", "a to b\n(measured)"]
    said = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert said[2] == ["send the JPEG", "send a cache"]
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert "transform-coded cache" in texts
    assert "the same at 16,384" in texts
