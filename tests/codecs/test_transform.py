"""The transform codec on caches that its profile was, and was not, made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.bitstream import Reader
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import profile as profiles
from kvferry.codecs import profile_store
from kvferry.codecs.profile import Basis, Profile
from kvferry.errors import BitstreamError, FingerprintError, InputError, KVFerryError, RecipeError
from kvferry.recipe import Recipe, compress, decompress
from kvferry.rope import Rotary

LAYERS, HEADS, DIM, RANK = 3, 2, 8, 40
WIDTH = LAYERS * HEADS * 2 * DIM
PRINT = "ab" * 16
ROTARY = Rotary(0.5 ** torch.arange(DIM // 2).float(), sections=(1, 1, 2))


def layout(n: int) -> PromptLayout:
    """Two text tokens, pictures, then text."""
    visual = np.zeros(n, np.uint8)
    visual[2 : n - 3] = 1
    return PromptLayout(
        token_ids=np.where(visual == 1, 7, np.arange(n) % 5).astype(np.int32),
        modality=visual,
        role=np.zeros(n, np.uint8),
        positions=np.stack([np.arange(n), np.arange(n) // 2, np.arange(n) % 5]).astype(np.int32),
    )


def make(seed: int = 0, rank: int = RANK) -> Profile:
    """A profile of vectors of ``rank`` directions."""
    generator = torch.Generator().manual_seed(seed)

    def basis() -> Basis:
        axes = torch.linalg.qr(torch.randn(WIDTH, rank, generator=generator))[0]
        root = torch.randn(LAYERS * HEADS * 2, DIM, DIM, generator=generator)
        weight = root @ root.mT / DIM + torch.eye(DIM)
        octaves = torch.linspace(24, -8, rank).round().to(torch.int16)
        return Basis(torch.randn(WIDTH, generator=generator), weight, axes, octaves)

    known = torch.tensor([0, 2, 7])
    means = torch.randn(3, WIDTH, generator=generator)
    return Profile(PRINT, basis(), basis(), known, means, (ROTARY, None, ROTARY), (LAYERS, HEADS, DIM), {"n": 1})


def drawn(profile: Profile, n: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> KVCache:
    """A cache of the statistics that the profile describes."""
    generator = torch.Generator().manual_seed(seed)
    prompt = layout(n)
    visual = torch.from_numpy(prompt.visual)
    x = profile.means(profiles.words(prompt), visual)
    for basis, mine in ((profile.visual, visual), (profile.text, ~visual)):
        c = torch.randn(int(mine.sum()), len(basis.octaves), generator=generator) * 2 ** (basis.octaves / 8)
        x[mine] += basis.inverse(c)
    keys, values = x.view(n, LAYERS, HEADS, 2, DIM).permute(3, 1, 2, 0, 4)
    where = torch.from_numpy(prompt.positions).long()
    index = torch.arange(n).expand(HEADS, -1).contiguous()
    layers = [
        LayerCache((k if r is None else r.rotate(k, where)).to(dtype), v.to(dtype), index)
        for k, v, r in zip(keys, values, profile.rotary, strict=True)
    ]
    return KVCache(tuple(layers), prompt, n, PRINT)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "made.profile"
    path.write_bytes(make().to_bytes())
    return path


def error(a: KVCache, b: KVCache) -> float:
    """Squared error relative to the energy."""
    pairs = [(x, y) for m, n in zip(a, b, strict=True) for x, y in ((m.keys, n.keys), (m.values, n.values))]
    return sum(float((x.float() - y.float()).pow(2).sum()) for x, y in pairs) / sum(
        float(x.float().pow(2).sum()) for x, _ in pairs
    )


def test_a_smaller_ratio_is_more_exact_and_larger(file: Path) -> None:
    cache = drawn(profiles.read(file)[0], 60)
    sizes, errors = [], []
    for ratio in (6, 12, 24, 96):
        blob = compress(cache, f"full|transform:{ratio}@{file}")
        sizes.append(len(blob))
        errors.append(error(cache, decompress(blob)))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 2e-3


def test_bytes_are_what_the_ratio_promises(file: Path) -> None:
    profile = profiles.read(file)[0]
    cache = drawn(profile, 400)
    for ratio in (8.0, 24.0):
        payload = Reader()
        payload.feed(compress(cache, f"full|transform:{ratio:g}@{file}"))
        bits = 8 * sum(f.payload_bytes for f in payload.frames) / (400 * WIDTH)
        assert bits == pytest.approx(16 / ratio, rel=0.15)


def test_apply_is_the_same_as_the_wire(file: Path) -> None:
    cache = drawn(profiles.read(file)[0], 30)
    recipe = Recipe.parse(f"full|transform:8@{file}")
    wire, short = decompress(compress(cache, recipe)), recipe.apply(cache)
    for a, b in zip(wire, short, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype(file: Path, dtype: torch.dtype) -> None:
    cache = drawn(profiles.read(file)[0], 30, dtype=dtype)
    assert error(cache, decompress(compress(cache, f"full|transform:2@{file}"))) < 5e-3


@given(st.integers(6, 40), st.integers(0, 99), st.sampled_from([2, 16, 400]), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_tiers_decode_to_the_same(file: Path, n: int, seed: int, ratio: int, tiers: int) -> None:
    cache = drawn(profiles.read(file)[0], n, seed)
    recipe = f"knorm@0.5,budget=shared|transform:{ratio}@{file}"
    one, many = (decompress(compress(cache, recipe, tiers=t)) for t in (1, tiers))
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a.positions, b.positions)
        torch.testing.assert_close(a.keys, b.keys, rtol=0.02, atol=0.02)


def test_one_token_works(file: Path) -> None:
    cache = drawn(profiles.read(file)[0], 30)
    one = decompress(compress(cache, f"knorm@0.01,budget=shared|transform:2@{file}"))
    assert one.kept == (1,) * LAYERS


def test_layers_that_keep_different_tokens_are_refused(file: Path) -> None:
    cache = drawn(profiles.read(file)[0], 30)
    with pytest.raises(InputError, match="budget=shared"):
        compress(cache, f"knorm@0.5|transform@{file}")


def test_nan_and_other_shapes_are_refused(file: Path) -> None:
    cache = drawn(profiles.read(file)[0], 30)
    odd = KVCache(cache.layers[:2], cache.layout, cache.length, PRINT)
    with pytest.raises(InputError, match="does not fit a profile"):
        compress(odd, f"full|transform@{file}")
    cache.layers[1].values[0, 3, 2] = torch.nan
    with pytest.raises(InputError, match="values of layer 1"):
        compress(cache, f"full|transform@{file}")


def test_profiles_are_bound_to_their_model(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = drawn(profiles.read(file)[0], 30)
    stranger = KVCache(cache.layers, cache.layout, cache.length, "cd" * 16)
    with pytest.raises(FingerprintError, match="another model"):
        compress(stranger, f"full|transform@{file}")
    with pytest.raises(InputError, match="kvferry fit transform MODEL"):
        compress(stranger, "full|transform")
    blob = compress(cache, f"full|transform@{file}")
    monkeypatch.setattr(profile_store, "_known", {})
    with pytest.raises(FingerprintError, match=profile_store.FOLDERS):
        decompress(blob)
    monkeypatch.setenv(profile_store.FOLDERS, str(file.parent))
    assert decompress(blob).kept == (30,) * LAYERS


def test_a_stream_opens_no_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = drawn(profiles.read(file)[0], 30)
    blob = compress(cache, f"full|transform@{file}")
    opened: list[Path] = []
    monkeypatch.setattr(profile_store, "read", lambda path: opened.append(path))
    decompress(blob)
    assert not opened


@pytest.mark.parametrize("damage", [b"", b"nothing", None])
def test_damaged_profiles_are_refused(file: Path, tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "p.profile"
    path.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(InputError, match="no profile"):
        profiles.read(path)
    with pytest.raises(InputError, match="no profile"):
        profiles.read(tmp_path / "missing.profile")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_payloads_end_in_named_errors(file: Path, data: st.DataObject) -> None:
    profile, digest = profile_store.add(file)
    cache = drawn(profile, 20)
    codec = Recipe.parse(f"full|transform:4@{file}").codec
    keys, values = (torch.stack([getattr(x, w) for x in cache]) for w in ("keys", "values"))
    where = cache.layers[0].positions[0]
    payload = bytearray(codec.encoder(PRINT).encode_tokens(keys, values, where, cache.layout))
    assert bytes(payload[:4]) == digest
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(payload)))
    try:
        got = codec.decoder(PRINT).decode_tokens(bytes(payload[:cut]), tuple(keys.shape), where, cache.layout)
    except (BitstreamError, FingerprintError):
        return
    assert bool(torch.isfinite(got[0]).all())
    assert bool(torch.isfinite(got[1]).all())


@pytest.mark.parametrize("text", ["transform:0.5", "transform:x"])
def test_bad_options(text: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.parse(f"full|{text}")


def test_canonical_text() -> None:
    for text in ("full|transform:64", "full|transform:20@a/b.profile", "q2c@0.1|transform:64|zstd"):
        assert str(Recipe.parse(text)) == text
    assert str(Recipe.parse("full|transform")) == "full|transform:64"
    assert issubclass(FingerprintError, KVFerryError)
