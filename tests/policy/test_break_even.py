"""The break-even map: the house's worked figures, and what must hold everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from kvferry.errors import InputError
from kvferry.policy import Context, crossover
from kvferry.policy.break_even import SHAPES, Machines, break_even_map, formula_points

MBIT = np.geomspace(1, 10_000, 25)
TOKENS = np.array([100, 1_369, 20_000])


def test_the_ratio_beyond_which_a_cache_beats_a_photo_at_any_rate() -> None:
    """A 1024 x 1024 picture, 1,369 tokens, 250 kB: 314 times for Qwen2-VL-7B, 157 for 2B."""
    small, large, _ = SHAPES
    assert large.cache_bytes_per_token == 57_344
    assert large.cache_bytes_per_token * 1_369 == pytest.approx(78.5e6, rel=1e-3)
    assert large.cache_bytes_per_token * 1_369 / 250e3 == pytest.approx(314, abs=0.1)
    assert small.cache_bytes_per_token * 1_369 / 250e3 == pytest.approx(157, abs=0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("held", [False, True])
def test_the_map_agrees_with_the_crossover_of_its_points(shape, held: bool) -> None:
    machines, load = Machines(), 0.9
    modes, _, seconds = break_even_map(shape, MBIT, TOKENS, load, machines, held)
    for row, tokens in enumerate(TOKENS.tolist()):
        image, _, *caches = formula_points(shape, tokens, machines, edge_holds_cache=held)
        context = Context(86_400, machines.rtt_seconds, prefill_queue_seconds=9 * image.cloud_seconds)
        for cache in caches:
            found = crossover(cache, image, context)
            faster = seconds[row, :, modes.index(cache.mode)] < seconds[row, :, 0]
            assert found.when in ("above", "never")
            assert np.array_equal(faster, (found.bits_per_second or np.inf) < MBIT * 1e6)


def test_load_and_a_cache_in_hand_only_help_the_cache() -> None:
    for shape in SHAPES:
        shares = []
        for load, held in ((0.0, False), (0.9, False), (0.99, False), (0.99, True)):
            modes, best, _ = break_even_map(shape, MBIT, TOKENS, load, Machines(), held)
            shares.append(np.mean([modes[i].startswith("kv") for i in best.ravel()]))
        assert shares == sorted(shares)
        assert shares[0] == 0, "an idle cloud with pixels at hand prefills sooner than a device eight times slower"
        assert shares[-1] > 0.3


def test_the_mildest_cache_that_wins_is_taken() -> None:
    modes, best, seconds = break_even_map(SHAPES[1], MBIT, TOKENS, 0.9, Machines(), True)
    caches = [i for i, mode in enumerate(modes) if mode.startswith("kv")]
    for row, column in np.ndindex(best.shape):
        others = min(seconds[row, column, :2])
        winners = [i for i in caches if seconds[row, column, i] < others]
        expected = winners[0] if winners else int(seconds[row, column, :2].argmin())
        assert best[row, column] == expected


def test_privacy_leaves_the_rest() -> None:
    modes, best, seconds = break_even_map(
        SHAPES[0], MBIT, TOKENS, 0.0, Machines(), privacy=frozenset({"no-pixels", "no-embeds"})
    )
    assert np.isinf(seconds[..., :2]).all()
    assert {modes[i] for i in best.ravel()} == {"kv:full|bf16"}


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match="load"):
        break_even_map(SHAPES[0], MBIT, TOKENS, 1.0, Machines())
    with pytest.raises(InputError, match="speeds"):
        Machines(edge_flops=0)
