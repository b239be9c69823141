"""The KVTC baseline: its dynamic program, its groups, and caches that its profile was, and was not, made for."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.bitstream import Reader
from kvferry.cache import KVCache, LayerCache
from kvferry.codecs import groups, profile_store
from kvferry.codecs.groups import BOUNDS, ERROR, Group, dequantize, plan, quantize
from kvferry.codecs.profile import Axes, PlainProfile, from_rows
from kvferry.errors import BitstreamError, FingerprintError, InputError, RecipeError
from kvferry.recipe import Recipe, compress, decompress
from tests.codecs.test_transform import DIM, HEADS, LAYERS, PRINT, ROTARY, error, layout, make

SIDE = LAYERS * HEADS * DIM
RANK = 40
SHAPE = (LAYERS, HEADS, DIM)
TURNS = (ROTARY, None, ROTARY)


def plain(seed: int = 0) -> PlainProfile:
    generator = torch.Generator().manual_seed(seed)

    def axes() -> Axes:
        vectors = torch.linalg.qr(torch.randn(SIDE, RANK, generator=generator))[0]
        return Axes(torch.randn(SIDE, generator=generator), vectors, torch.linspace(24, -16, RANK).round().short())

    return PlainProfile(PRINT, axes(), axes(), TURNS, SHAPE, {"n": 1})


def drawn(profile: PlainProfile, n: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> KVCache:
    """A cache of the statistics that the profile describes."""
    generator, prompt = torch.Generator().manual_seed(seed), layout(n)
    both = [
        axes.mean + (torch.randn(n, RANK, generator=generator) * 2 ** (axes.octaves / 8)) @ axes.vectors.T
        for axes in (profile.keys, profile.values)
    ]
    rows = torch.stack([x.view(n, LAYERS, HEADS, DIM) for x in both], 3).flatten(1)
    keys, values = from_rows(TURNS, rows, SHAPE, torch.from_numpy(prompt.positions).long())
    index = torch.arange(n).expand(HEADS, -1).contiguous()
    layers = [LayerCache(k.to(dtype), v.to(dtype), index) for k, v in zip(keys, values, strict=True)]
    return KVCache(tuple(layers), prompt, n, PRINT)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "plain.profile"
    path.write_bytes(plain().to_bytes())
    return path


def cost(chosen: tuple[Group, ...], octaves: list[int], tokens: int) -> tuple[float, int]:
    """Expected squared error and bits."""
    variance = [2 ** (x / 4) for x in octaves]
    left = sum(variance)
    bits = 0
    for group in chosen:
        inside = variance[group.span]
        spread = sum(inside) if group.width == 8 else len(inside) * inside[0]
        left += ERROR[group.width] * spread - sum(inside)
        bits += tokens * len(inside) * group.width + BOUNDS
    return left, bits


def every_way(count: int, sizes: tuple[int, ...], at: int = 0) -> list[tuple[Group, ...]]:
    if at >= count:
        return [()]
    ways = every_way(count, sizes, at + 1)
    for size, width in product(sizes, ERROR):
        if at + size <= count:
            ways += [(Group(at, at + size, width), *rest) for rest in every_way(count, sizes, at + size)]
    return ways


@given(
    st.lists(st.integers(-30, 40), min_size=1, max_size=6),
    st.integers(1, 30),
    st.integers(0, 900),
)
@settings(max_examples=40, deadline=None)
def test_the_plan_is_the_best_there_is(octaves: list[int], tokens: int, bits: int) -> None:
    octaves.sort(reverse=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "SIZES", (1, 3))
        chosen = plan.__wrapped__(tuple(octaves), tokens, bits)
    mine, spent = cost(chosen, octaves, tokens)
    assert spent <= bits
    possible = [e for e, b in (cost(way, octaves, tokens) for way in every_way(len(octaves), (1, 3))) if b <= bits]
    assert mine == pytest.approx(min(possible), rel=1e-9)


@given(st.integers(1, 300), st.sampled_from([2, 9, 40]))
@settings(max_examples=20, deadline=None)
def test_large_budgets_are_not_exceeded(tokens: int, ratio: int) -> None:
    octaves, bits = list(range(60, -20, -1)), 16 * 80 * tokens // ratio
    assert cost(plan(tuple(octaves), tokens, bits), octaves, tokens)[1] <= bits


@given(
    st.sampled_from([2, 4, 8]),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_groups_come_back(width: groups.Width, axes: int, tokens: int, size: float, seed: int) -> None:
    numbers = size * (3 + torch.randn(axes, tokens, generator=torch.Generator().manual_seed(seed)))
    low, scale, packed = quantize(numbers, width)
    back = low + scale * dequantize(packed, width, numbers.numel()).view(axes, tokens)
    spread = float(numbers.max() - numbers.min())
    worst = spread / 16 if width == 8 else spread / (2**width - 1)
    assert float((back - numbers).double().square().mean().sqrt()) <= worst + 0.02 * float(numbers.abs().max())


def test_a_smaller_ratio_is_more_exact_and_larger(file: Path) -> None:
    cache = drawn(plain(), 60)
    sizes, errors = [], []
    for ratio in (3, 6, 12, 48):
        blob = compress(cache, f"full|kvtc:{ratio}@{file},window=2")
        sizes.append(len(blob))
        errors.append(error(cache, decompress(blob)))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 2e-3


def test_bytes_are_what_ratio_window_and_sinks_promise(file: Path) -> None:
    cache = drawn(plain(), 200)
    for ratio, window in ((8, 0), (16, 10)):
        reader = Reader()
        reader.feed(compress(cache, f"full|kvtc:{ratio}@{file},window={window}"))
        exact = window * 4 * SIDE + 4 * LAYERS * HEADS * 2 * (DIM + 2) + 4
        coded = 2 * SIDE * (196 - window) * 2 / ratio
        payload = sum(frame.payload_bytes for frame in reader.frames)
        assert exact + 0.9 * coded <= payload <= exact + coded + 64


def test_the_window_is_exact_and_sinks_nearly(file: Path) -> None:
    cache = drawn(plain(), 40, dtype=torch.bfloat16)
    decoded = decompress(compress(cache, f"full|kvtc:400@{file},window=5"))
    for a, b in zip(cache, decoded, strict=True):
        assert torch.equal(a.keys[:, -5:], b.keys[:, -5:])
        assert torch.equal(a.values[:, -5:], b.values[:, -5:])
        torch.testing.assert_close(a.keys[:, :4], b.keys[:, :4], rtol=0.07, atol=0.02)
        assert not torch.allclose(a.keys[:, 10].float(), b.keys[:, 10].float(), rtol=0.07, atol=0.02)


def test_apply_is_the_same_as_the_wire(file: Path) -> None:
    cache = drawn(plain(), 30)
    recipe = Recipe.parse(f"full|kvtc:8@{file}|zstd")
    for a, b in zip(decompress(compress(cache, recipe)), recipe.apply(cache), strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


@given(st.integers(6, 40), st.integers(0, 99), st.sampled_from([2, 16, 400]), st.integers(1, 3), st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_tiers_of_any_selection_decode(file: Path, n: int, seed: int, ratio: int, tiers: int, window: int) -> None:
    cache = drawn(plain(), n, seed)
    blob = compress(cache, f"knorm@0.5,budget=shared|kvtc:{ratio}@{file},window={window}", tiers=tiers)
    decoded = decompress(blob)
    assert len(set(decoded.kept)) == 1
    assert all(bool(torch.isfinite(x.keys.float()).all()) for x in decoded)


def test_what_does_not_fit_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = drawn(plain(), 30)
    with pytest.raises(InputError, match="budget=shared"):
        compress(cache, f"knorm@0.5|kvtc@{file}")
    with pytest.raises(InputError, match="does not fit a profile"):
        compress(KVCache(cache.layers[:2], cache.layout, cache.length, PRINT), f"full|kvtc@{file}")
    stranger = KVCache(cache.layers, cache.layout, cache.length, "cd" * 16)
    with pytest.raises(FingerprintError, match="another model"):
        compress(stranger, f"full|kvtc@{file}")
    other = tmp_path / "transform.profile"
    other.write_bytes(make().to_bytes())
    with pytest.raises(InputError, match="kvferry fit kvtc MODEL"):
        compress(cache, f"full|kvtc@{other}")
    blob = compress(cache, f"full|kvtc@{file}")
    monkeypatch.setattr(profile_store, "_known", {})
    with pytest.raises(FingerprintError, match=profile_store.FOLDERS):
        decompress(blob)
    cache.layers[1].values[0, 3, 2] = torch.nan
    with pytest.raises(InputError, match="values of layer 1"):
        compress(cache, f"full|kvtc@{file}")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_payloads_end_in_named_errors(file: Path, data: st.DataObject) -> None:
    profile, digest = profile_store.add(file)
    assert isinstance(profile, PlainProfile)
    cache = drawn(profile, 20)
    codec = Recipe.parse(f"full|kvtc:4@{file},window=3").codec
    keys, values = (torch.stack([getattr(x, w) for x in cache]) for w in ("keys", "values"))
    where = cache.layers[0].positions[0]
    payload = bytearray(codec.encoder(PRINT).encode_tokens(keys, values, where, cache.layout))
    assert bytes(payload[:4]) == digest
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([len(payload), len(payload), len(payload) - 1, 3]))
    try:
        got = codec.decoder(PRINT).decode_tokens(bytes(payload[:cut]), tuple(keys.shape), where, cache.layout)
    except (BitstreamError, FingerprintError):
        return
    assert cut == len(payload)
    assert all(bool(torch.isfinite(x.float()).all()) for x in got)


def test_text() -> None:
    for text in ("full|kvtc:16", "full|kvtc:20@a/b.profile,window=128|zstd"):
        assert str(Recipe.parse(text)) == text
    for text in ("kvtc:0.5", "kvtc:x", "kvtc,window=-1"):
        with pytest.raises(RecipeError):
            Recipe.parse(f"full|{text}")
