"""Visual tokens predicted from their neighbours: where those are, what it saves, and that no error grows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import profile as profiles
from kvferry.codecs import profile_store, transform
from kvferry.codecs.neighbours import Lattice
from kvferry.codecs.profile import Prediction, Profile, to_rows
from kvferry.codecs.transform import TransformCoder
from kvferry.errors import InputError
from kvferry.fit.neighbours import fit, neighbourhoods
from kvferry.recipe import Recipe, compress, decompress
from tests.codecs.test_transform import DIM, HEADS, LAYERS, PRINT, RANK, make

GRIDS = ((1, 3, 4), (2, 2, 3))
LEFT, ABOVE = 0.6, 0.35


def layout(grids: tuple[tuple[int, int, int], ...] = GRIDS) -> PromptLayout:
    """Two text tokens, the pictures, three text tokens."""
    visual = np.zeros(5 + sum(f * r * c for f, r, c in grids), np.uint8)
    visual[2:-3] = 1
    n = len(visual)
    where = np.stack([np.arange(n), np.arange(n) // 2, np.arange(n) % 5]).astype(np.int32)
    return PromptLayout(
        np.where(visual == 1, 7, np.arange(n) % 5).astype(np.int32), visual, visual * 0, where, 0, grids
    )


def weights(left: float, above: float) -> torch.Tensor:
    """``left + above`` for whoever has one neighbour only."""
    alone = left + above
    rows = torch.tensor([[alone, 0, 0], [0, alone, 0], [left, above, 0]])
    return rows[:, :, None].repeat(1, 1, RANK)


def predicting(profile: Profile, left: float = LEFT, above: float = ABOVE, narrower: int = 10) -> Profile:
    return replace(
        profile, prediction=Prediction(weights(left, above), (profile.visual.octaves - narrower).repeat(3, 1))
    )


def smooth(profile: Profile, prompt: PromptLayout, seed: int = 0) -> torch.Tensor:
    """Coefficients of visual tokens, each near the mean of its neighbours, ``[n, r]``."""
    generator = torch.Generator().manual_seed(seed)
    lattice = Lattice(prompt)
    n = len(lattice.wave) - 1
    fresh = torch.randn(n, RANK, generator=generator) * 2 ** (profile.visual.octaves / 8)
    c = torch.zeros(n + 1, RANK)
    for token in np.argsort(lattice.wave[:n], kind="stable").tolist():
        left, above = lattice.beside[:, token].tolist()
        a, b = {(0, 0): (0, 0), (1, 0): (LEFT + ABOVE, 0), (0, 1): (0, LEFT + ABOVE)}.get(
            (left < n, above < n), (LEFT, ABOVE)
        )
        c[token] = a * c[left] + b * c[above] + fresh[token] * (0.3 if a or b else 1)
    return c[:n]


def cache_of(profile: Profile, prompt: PromptLayout, c: torch.Tensor) -> KVCache:
    visual = torch.from_numpy(prompt.visual)
    x = profile.means(profiles.words(prompt), visual)
    x[visual] += profile.visual.inverse(c)
    keys, values = x.view(len(x), LAYERS, HEADS, 2, DIM).permute(3, 1, 2, 0, 4)
    where = torch.from_numpy(prompt.positions).long()
    index = torch.arange(len(x)).expand(HEADS, -1).contiguous()
    layers = [
        LayerCache(k if r is None else r.rotate(k, where), v.contiguous(), index)
        for k, v, r in zip(keys, values, profile.rotary, strict=True)
    ]
    return KVCache(tuple(layers), prompt, len(x), PRINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles")
    plain = make()
    for name, profile in {
        "plain": plain,
        "predicting": predicting(plain),
        "nothing": predicting(plain, 0, 0, 0),
    }.items():
        (path / f"{name}.profile").write_bytes(profile.to_bytes())
    return path


def test_neighbours_are_those_of_the_same_picture() -> None:
    lattice = Lattice(layout())
    left, above = lattice.beside.tolist()
    none = 24
    assert left[:8] == [none, 0, 1, 2, none, 4, 5, 6]
    assert above[:8] == [none] * 4 + [0, 1, 2, 3]
    assert left[12:18] == [none, 12, 13, none, 15, 16]
    assert above[12:24] == [none] * 3 + [12, 13, 14] + [none] * 3 + [18, 19, 20], "frames are pictures of their own"
    assert (left[none], above[none]) == (none, none)
    for token in range(none):
        assert all(x == none or lattice.wave[x] < lattice.wave[token] for x in lattice.beside[:, token])


@pytest.mark.parametrize("grids", [(), ((1, 3, 5),), ((0, 1 << 30, 4), (1, 4, 6)), ((1, 24, 1), (0, 7, 7))])
def test_grids_that_do_not_fit_say_nothing(grids: tuple[tuple[int, int, int], ...]) -> None:
    assert (Lattice(replace(layout(), grids=grids)).beside == 24).all()


@given(st.integers(0, 99), st.sampled_from([4, 24, 64]), st.integers(1, 4), st.floats(0.1, 1), st.data())
@settings(max_examples=40, deadline=None)
def test_no_error_is_larger_than_rounding(
    folder: Path, seed: int, ratio: int, frames: int, share: float, data: st.DataObject
) -> None:
    """Whatever is kept and in however many frames: each decoded coefficient is within 0.6 steps of what it was, as
    it would not be if the encoder predicted from other numbers than the decoder."""
    profile, _ = profile_store.add(folder / "predicting.profile")
    prompt = layout()
    cache = cache_of(profile, prompt, smooth(profile, prompt, seed))
    codec = Recipe.parse(f"full|transform:{ratio}@{folder}/predicting.profile").codec
    encoder, decoder = codec.encoder(PRINT), codec.decoder(PRINT)
    order = np.array(data.draw(st.permutations(range(len(prompt)))))[: max(1, int(share * len(prompt)))]
    for some in np.array_split(order, frames):
        where = torch.from_numpy(np.sort(some))
        keys, values = (torch.stack([getattr(x, w)[:, where] for x in cache]) for w in ("keys", "values"))
        payload = encoder.encode_tokens(keys, values, where, prompt)
        got = decoder.decode_tokens(payload, tuple(keys.shape), where, prompt)
        visual = torch.from_numpy(prompt.visual)[where]
        turned = torch.from_numpy(prompt.positions).long()[:, where]
        was, now = (to_rows(profile.rotary, *pair, turned)[visual] for pair in ((keys, values), got))
        step = 2 ** (encoder._step / 8)
        error = profile.visual.forward(now - was)[:, profile.visual.octaves - encoder._step >= transform._DEAD] / step
        rounding = profile.visual.forward(was.abs()).abs().amax(1, keepdim=True) * 2**-6 / step if len(was) else 0
        assert bool((error.abs() <= 0.61 + rounding).all())


def test_smooth_pictures_take_fewer_bytes(folder: Path) -> None:
    prompt = layout(((1, 12, 12),))
    profile, _ = profiles.read(folder / "plain.profile")
    cache = cache_of(profile, prompt, smooth(profile, prompt))
    plain, less = (
        len(compress(cache, f"full|transform:8@{folder}/{name}.profile")) for name in ("plain", "predicting")
    )
    assert less < 0.9 * plain


def test_frames_learn_from_earlier_ones(folder: Path) -> None:
    """Every other column first: the columns between are predicted from them."""
    prompt = layout(((1, 12, 12),))
    profile, _ = profiles.read(folder / "predicting.profile")
    cache = cache_of(profile, prompt, smooth(profile, prompt))
    codec = Recipe.parse(f"full|transform:8@{folder}/predicting.profile").codec
    together, apart = codec.encoder(PRINT), codec.encoder(PRINT)
    sizes = []
    for coders, columns in (((together,), 0), ((together, apart), 1)):
        where = torch.arange(2 + columns, 2 + 144, 2)
        keys, values = (torch.stack([getattr(x, w)[:, where] for x in cache]) for w in ("keys", "values"))
        sizes += [len(coder.encode_tokens(keys, values, where, prompt)) for coder in coders]
    assert sizes[1] < 0.95 * (sizes[2] - transform._HEAD.size)


@pytest.mark.parametrize("tiers", [1, 3])
def test_weights_of_zero_change_no_byte(folder: Path, tiers: int) -> None:
    prompt = layout()
    profile, _ = profiles.read(folder / "plain.profile")
    cache = cache_of(profile, prompt, smooth(profile, prompt))
    for recipe in ("full", "knorm@0.5,budget=shared"):
        plain, nothing = (
            decompress(compress(cache, f"{recipe}|transform:16@{folder}/{name}.profile", tiers=tiers))
            for name in ("plain", "nothing")
        )
        for a, b in zip(plain, nothing, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)
    keys, values = (torch.stack([getattr(x, w) for x in cache]) for w in ("keys", "values"))
    payloads = [
        Recipe.parse(f"full|transform:16@{folder}/{name}.profile")
        .codec.encoder(PRINT)
        .encode_tokens(keys, values, torch.arange(len(prompt)), prompt)
        for name in ("plain", "nothing")
    ]
    assert payloads[0][4:] == payloads[1][4:]


def test_symbols_do_not_depend_on_how_a_processor_rounds(folder: Path) -> None:
    """A decoder whose predictions differ in their last digits reads the same symbols, so that its error stays there."""
    prompt = layout(((1, 12, 12),))
    profile, _ = profile_store.add(folder / "predicting.profile")
    cache = cache_of(profile, prompt, smooth(profile, prompt))
    keys, values = (torch.stack([getattr(x, w) for x in cache]) for w in ("keys", "values"))
    where = torch.arange(len(prompt))
    encoder = Recipe.parse(f"full|transform:8@{folder}/predicting.profile").codec.encoder(PRINT)
    payload = encoder.encode_tokens(keys, values, where, prompt)
    found = []
    for off in (0.0, 1e-5):
        there = replace(profile, prediction=replace(profile.prediction, weights=profile.prediction.weights * (1 - off)))
        decoder = TransformCoder(PRINT, there, payload[: transform._HEAD.size])
        decoder._started = True
        found.append(
            decoder.decode_tokens(payload[transform._HEAD.size :], tuple(keys.shape), where, prompt)[1].float()
        )
    assert not torch.equal(*found)
    torch.testing.assert_close(found[0], found[1], rtol=0.01, atol=0.01)


def test_profiles_say_when_they_predict(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, _ = profiles.read(folder / "predicting.profile")
    assert profile.prediction is not None
    torch.testing.assert_close(profile.prediction.weights, weights(LEFT, ABOVE))
    assert profiles.read(folder / "plain.profile")[0].prediction is None
    monkeypatch.setattr(profiles, "VERSION", 1)
    profiles.read(folder / "plain.profile")
    with pytest.raises(InputError, match="newer kvferry"):
        profiles.read(folder / "predicting.profile")


def test_predictions_that_do_not_fit_are_refused() -> None:
    octaves = torch.zeros(3, RANK, dtype=torch.int16)
    with pytest.raises(InputError, match="do not fit each other"):
        Prediction(weights(0.5, 0.5), octaves[:2])
    for bad in (weights(0.8, 0.3), weights(0.5, 0.5) * torch.nan):
        with pytest.raises(InputError, match="grow from token to token"):
            Prediction(bad, octaves)
    with pytest.raises(InputError, match="other coefficients"):
        replace(make(), prediction=Prediction(weights(0.5, 0.5)[:, :, :3], octaves[:, :3]))


def test_calibration_finds_the_weights() -> None:
    profile = make()
    prompt = layout(((1, 40, 39),))
    x = torch.zeros(len(prompt), len(profile.visual.mean))
    x[torch.from_numpy(prompt.visual)] = profile.visual.inverse(smooth(profile, prompt)) + profile.visual.mean
    everything, some = np.arange(len(prompt)), np.arange(2, len(prompt) - 3, 3)
    triples, patterns = neighbourhoods(x[some], some, prompt)
    sparse = torch.stack(list(triples)), torch.from_numpy(patterns)
    assert set(patterns.tolist()) == {2}, "of every third of 39 tokens in a row none has a left neighbour"
    triples, patterns = neighbourhoods(x, everything, prompt)
    dense = torch.stack(list(triples)), torch.from_numpy(patterns)
    assert np.bincount(patterns).tolist() == [0, 38, 39, 38 * 39]
    assert all(len(x) == 39 * 40 - 1 for x in dense)
    found = fit(profile.visual, [dense])
    assert (found.weights[2, 0] - LEFT).abs().mean() < 0.03
    assert (found.weights[2, 1] - ABOVE).abs().mean() < 0.03
    expected = profile.visual.octaves + 8 * np.log2(0.3)
    assert (found.octaves[2] - expected).abs().max() <= 2
    assert bool((found.weights[0, 1] == 0).all())
    only_above = fit(profile.visual, [sparse])
    assert bool((only_above.weights[[0, 2]] == 0).all()), "nothing is known where nothing was seen"
    assert bool((only_above.weights[1, 1] > 0.5).all())


def test_calibration_never_makes_a_prediction_that_grows() -> None:
    """Each token twice its left neighbour."""
    profile = make()
    c = torch.stack([2.0**-k * torch.ones(1, RANK) for k in range(7)][::-1], 1)[0]
    x = profile.visual.inverse(c) + profile.visual.mean
    triples = torch.stack([torch.stack([b, a, torch.zeros_like(a)]) for a, b in pairwise(x)])
    found = fit(profile.visual, [(triples, torch.ones(6, dtype=torch.int64))])
    assert found.weights[0, 0].max() < 1
