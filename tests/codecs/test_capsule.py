"""Capsules of made-up profiles, whose right values can be told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import profile_store
from kvferry.codecs.capsule import Capsule, CapsuleCoder
from kvferry.codecs.capsule_profile import CapsuleProfile, Network, costs, network_numbers
from kvferry.codecs.grids import NEAREST, PLACE, cosines, pictures, plan, spread
from kvferry.codecs.profile import read
from kvferry.errors import CorruptError, FingerprintError, InputError
from kvferry.recipe import Recipe, compress, decompress
from kvferry.rope import Rotary
from tests.helpers import cache as random_cache
from tests.helpers import layout

LAYERS, HEADS, DIM = 3, 2, 8
WIDTH = HEADS * DIM
ROTARY = Rotary(torch.tensor([0.5, 0.3, 0.2, 0.1]), sections=(1, 2, 1))


def made(rows: int = 6, columns: int = 6, held: int = 36, hidden: int = 3, seed: int = 0) -> CapsuleProfile:
    """Networks of random weights, and cosines as they are for components."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) / 4

    inputs = NEAREST * WIDTH + PLACE
    network = Network(
        some(LAYERS, inputs, hidden), some(LAYERS, hidden), some(LAYERS, hidden, WIDTH), some(LAYERS, WIDTH)
    )
    basis = torch.eye(rows * columns)[:, :held].view(rows, columns, held).expand(LAYERS, -1, -1, -1)
    return CapsuleProfile(
        "ab" * 32, {"keys": some(LAYERS, WIDTH), "values": some(LAYERS, WIDTH)},
        {"keys": torch.ones(LAYERS, WIDTH), "values": torch.ones(LAYERS, WIDTH)},
        {"keys": network, "values": network}, {"keys": basis, "values": basis},
        (ROTARY,) * LAYERS, (LAYERS, HEADS, DIM), {},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The profile's file, and nothing known of other tests."""
    monkeypatch.setattr(profile_store, "_known", {})
    path = tmp_path / "c.profile"
    path.write_bytes(made().to_bytes())
    return path


def arrived(cache: KVCache, recipe: str) -> KVCache:
    return decompress(compress(cache, recipe))


def visual_of(cache: KVCache) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(cache.layout.visual))


def smooth(prompt: PromptLayout) -> KVCache:
    """Every channel of a picture's values, and of its un-rotated keys, is one number."""
    cache, tokens = random_cache(prompt), torch.from_numpy(np.flatnonzero(prompt.visual))
    where = torch.from_numpy(prompt.positions[:, prompt.visual].astype(np.int64))
    layers = []
    for x in cache:
        keys, values = x.keys.clone(), x.values.clone()
        keys[:, tokens] = ROTARY.rotate(keys[:, tokens[:1]].expand(-1, len(tokens), -1).float(), where).bfloat16()
        values[:, tokens] = values[:, tokens[:1]]
        layers.append(LayerCache(keys, values, x.positions))
    return replace(cache, layers=tuple(layers))


def test_tokens_lie_evenly() -> None:
    assert spread(3, 3, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(4, 5, 20).tolist() == list(range(20))
    how = plan(3, 3, 5)
    assert how.absent.tolist() == [1, 3, 5, 7]
    assert sorted(how.kept[how.near[0, :3]].tolist()) == [0, 2, 4]
    assert how.shares.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert how.shares[0].tolist() == pytest.approx([5 / 16, 5 / 16, 5 / 16, 1 / 16])  # 1, 1, 1 and 5 away, squared
    assert plan(2, 2, 1).near.tolist() == [[0] * NEAREST] * 3


def test_every_frame_is_a_picture() -> None:
    prompt = layout(rows=4, columns=5)
    (one,) = pictures(prompt)
    assert one[:2] == (4, 5)
    two = pictures(replace(prompt, grids=((2, 2, 5),)))
    assert [x[:2] for x in two] == [(2, 5), (2, 5)]
    assert two[1][2].tolist() == one[2].tolist()[10:]
    with pytest.raises(InputError, match="does not place its visual tokens on a grid"):
        pictures(replace(prompt, grids=()))


def test_kept_keys_and_text_are_exact_and_the_rest_is_the_network(here: Path) -> None:
    cache = random_cache()
    found = arrived(cache, f"full|capsule:0.4@{here},codec=bf16,values=full")
    profile, _ = read(here)
    assert isinstance(profile, CapsuleProfile)
    how, tokens = plan(4, 5, 8), visual_of(cache)
    text = torch.from_numpy(np.flatnonzero(~cache.layout.visual[: cache.length]))
    where = torch.from_numpy(cache.layout.positions[:, tokens.numpy()].astype(np.int64))
    for layer, (a, b) in enumerate(zip(cache, found, strict=True)):
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.keys[:, text], b.keys[:, text])
        assert torch.equal(a.keys[:, tokens[how.kept]], b.keys[:, tokens[how.kept]])
        straight = ROTARY.unrotate(a.keys[:, tokens].float(), where).permute(1, 0, 2).flatten(1)
        kept = (straight - profile.means["keys"][layer])[None, how.kept]
        network, near = profile.networks["keys"], kept[0, how.near]
        x = torch.cat([near.flatten(1), how.place], 1)
        inner = torch.nn.functional.gelu(x @ network.first[layer] + network.bias[layer])
        rows = (how.shares[..., None] * near).sum(1) + inner @ network.second[layer] + network.offset[layer]
        rows = (rows + profile.means["keys"][layer]).view(-1, HEADS, DIM).permute(1, 0, 2)
        expected = ROTARY.rotate(rows, where[:, how.absent])
        assert b.keys[:, tokens[how.absent]].float() == pytest.approx(expected, abs=0.02)


def test_components_are_the_nearest_sum_of_the_first_ones(here: Path) -> None:
    """With cosines for components and a picture of the profile's grid: a cut spectrum."""
    cache = random_cache(layout(rows=6, columns=6))
    found = arrived(cache, f"full|capsule:0.5@{here},codec=bf16,keys=full")
    profile, _ = read(here)
    tokens, waves = visual_of(cache), torch.kron(cosines(6), cosines(6))[:, :18].float()
    for a, b, mean in zip(cache, found, profile.means["values"], strict=True):  # type: ignore[attr-defined]
        assert torch.equal(a.keys, b.keys)
        mean = mean.view(HEADS, 1, DIM)
        off = a.values[:, tokens].float() - mean
        assert b.values[:, tokens].float() == pytest.approx(waves @ (waves.T @ off) + mean, abs=0.04)


@pytest.mark.parametrize("ways", ["keys=interpolated,values=pca", "keys=pca,values=interpolated"])
def test_what_is_alike_everywhere_is_rebuilt(here: Path, ways: str) -> None:
    """Keys are alike before they are turned: a rebuilt one is turned to its own place. Of a smaller grid, too."""
    cache = smooth(layout(rows=4, columns=5))
    found = arrived(cache, f"full|capsule:0.3@{here},codec=bf16,{ways}")
    for a, b in zip(cache, found, strict=True):
        assert b.keys.float() == pytest.approx(a.keys.float(), abs=0.05)
        assert b.values.float() == pytest.approx(a.values.float(), abs=0.05)


@pytest.mark.parametrize(("share", "carried"), [(0.6, 12), (0.4, 8), (0.2, 4), (0.01, 1)])
def test_bytes_follow_the_share(here: Path, share: float, carried: int) -> None:
    cache, coder = random_cache(), Capsule(share, str(here), codec="bf16").encoder("ab" * 32)
    text = cache.length - 20
    for layer, x in enumerate(cache):
        payload = coder.encode(layer, x.keys, x.values, x.positions, cache.layout)
        assert len(payload) == 4 + 2 * 2 * WIDTH * (text + carried)


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8", "kivi:4", "turbo:4"])
def test_inner_codecs(here: Path, codec: str) -> None:
    exact = arrived(random_cache(), f"full|capsule:0.4@{here},codec=bf16")
    found = arrived(random_cache(), f"full|capsule:0.4@{here},codec={codec}|zstd")
    for a, b in zip(exact, found, strict=True):
        assert float((a.keys - b.keys).float().norm() / a.keys.float().norm()) < 0.25
        assert float((a.values - b.values).float().norm() / a.values.float().norm()) < 0.25


def test_text_alone_is_the_inner_codec(here: Path) -> None:
    cache = random_cache(layout(rows=0, columns=0))
    for codec in ("bf16", "int8"):
        found, plain = arrived(cache, f"full|capsule@{here},codec={codec}"), Recipe.parse(f"full|{codec}").apply(cache)
        for a, b in zip(plain, found, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


def test_a_picture_is_there_or_not(here: Path) -> None:
    cache = random_cache()
    recipe = f"random@0.5,budget=shared|capsule@{here}"
    with pytest.raises(InputError, match=r"\d+ of a picture's 20 tokens were evicted, or travel in another tier"):
        compress(cache, recipe)
    with pytest.raises(InputError, match="another tier"):
        compress(cache, f"full|capsule@{here}", tiers=3)
    gone = arrived(cache, f"none|capsule@{here},codec=bf16")
    assert not gone.layout.visual[gone.layers[0].positions.numpy()].any()
    with pytest.raises(InputError, match="heads keep different tokens"):
        compress(cache, f"knorm@0.5,budget=head|capsule@{here}")


def test_all_of_a_picture_is_exact(here: Path) -> None:
    cache = random_cache()
    found = arrived(cache, f"full|capsule:1@{here},codec=bf16,values=interpolated")
    for a, b in zip(cache, found, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_another_model_grid_or_shape_is_refused(here: Path) -> None:
    cache = random_cache()
    with pytest.raises(FingerprintError, match="another model"):
        compress(replace(cache, fingerprint="cd" * 32), f"full|capsule@{here}")
    with pytest.raises(InputError, match="pictures of up to 6 x 6 tokens, and this one has 4 x 7"):
        compress(random_cache(layout(rows=4, columns=7)), f"full|capsule@{here}")
    with pytest.raises(InputError, match="does not fit a profile for 3 layers of 2 heads and 8 channels"):
        compress(random_cache(dim=4), f"full|capsule@{here}")
    with pytest.raises(InputError, match="does not fit a profile"):
        compress(random_cache(layers=4), f"full|capsule@{here}")


def test_what_was_not_learned_is_refused(here: Path) -> None:
    profile = made(held=10)
    here.write_bytes(replace(profile, networks={}, bases={"values": profile.bases["values"]}).to_bytes())
    said_of = {"keys=full,values=mlp": "no mlp of values", "keys=pca": "no pca of keys", "keys=mlp": "no mlp of keys"}
    for options, said in said_of.items():
        with pytest.raises(InputError, match=said):
            compress(random_cache(), f"full|capsule:0.4@{here},{options}")
    with pytest.raises(InputError, match="holds 10 components, not 12 for 4 x 5 tokens"):
        compress(random_cache(), f"full|capsule:0.6@{here},keys=full")


def test_no_profile_or_one_of_another_codec(here: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kvferry fit capsule MODEL"):
        compress(random_cache(), "full|capsule")
    with pytest.raises(InputError, match=r"is a profile for capsule, not for transform"):
        compress(random_cache(), f"full|transform@{here}")


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("ways", ["", ",keys=pca,values=mlp"])
def test_not_finite(here: Path, side: str, ways: str) -> None:
    cache = random_cache()
    getattr(cache.layers[1], side)[0, 9, 2] = float("nan")
    with pytest.raises(InputError, match=f"the {side} of layer 1 hold NaN"):
        compress(cache, f"full|capsule@{here}{ways}")


def test_no_file_that_a_stream_names_is_opened(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = compress(random_cache(), f"full|capsule@{here}")
    monkeypatch.setattr(profile_store, "_known", {})
    with pytest.raises(FingerprintError, match="needs the capsule profile"):
        decompress(blob)
    monkeypatch.setenv(profile_store.FOLDERS, str(here.parent))
    assert decompress(blob).length == random_cache().length


def test_payloads_of_wrong_sizes_are_corrupt(here: Path) -> None:
    cache, capsule = random_cache(), Capsule(0.4, str(here))
    x = cache.layers[0]
    payload = capsule.encoder("ab" * 32).encode(0, x.keys, x.values, x.positions, cache.layout)
    shape = (HEADS, cache.length, DIM)
    for wrong in (payload[:-1], payload + b"x", payload[:3]):
        with pytest.raises(CorruptError):
            capsule.decoder("ab" * 32).decode(0, wrong, shape, shape, x.positions, cache.layout)
    some = x.positions[:, ::2]
    with pytest.raises(CorruptError, match="no encoder writes such a frame"):
        capsule.decoder("ab" * 32).decode(0, payload, (HEADS, 16, DIM), (HEADS, 16, DIM), some, cache.layout)
    with pytest.raises(InputError, match="a decoder does not encode"):
        CapsuleCoder(capsule, "ab" * 32).encode(0, x.keys, x.values, x.positions, cache.layout)


def test_a_share_is_one() -> None:
    for share in ("0", "1.2", "-1"):
        with pytest.raises(InputError, match="a share lies above 0"):
            Recipe.parse(f"full|capsule:{share}")
    assert (
        str(Recipe.parse("full|capsule:0.25@a.profile,codec=int4|zstd"))
        == "full|capsule:0.25@a.profile,codec=int4|zstd"
    )


def test_sizes_by_formula_are_those_of_the_file() -> None:
    profile = made(hidden=3, held=18)
    slim = replace(profile, networks={"keys": profile.networks["keys"]}, bases={"values": profile.bases["values"]})
    numbers = network_numbers(LAYERS, WIDTH, 3)
    assert numbers == sum(x.numel() for x in vars(slim.networks["keys"]).values())
    cost = costs(LAYERS, HEADS, DIM, 36, 3, 0.5, 0.25)
    held = sum(x.numel() for name, x in slim.tensors().items() if name.startswith(("network", "basis")))
    assert cost["bytes"] == 2 * held
    assert cost["components"] == LAYERS * 9 * WIDTH
    inputs = NEAREST * WIDTH + PLACE
    assert cost["rebuilding"] == 0.75 * LAYERS * (NEAREST * WIDTH + 3 * (inputs + WIDTH)) + LAYERS * 9 * WIDTH
