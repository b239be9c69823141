"""Transform coding with bases that scale: nothing is out of reach, and files stay small."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.bitstream import Reader
from kvferry.cache import KVCache, LayerCache, PromptLayout, Role
from kvferry.codecs import Transform, profile_store
from kvferry.codecs import profile as profiles
from kvferry.codecs.profile import words
from kvferry.codecs.tree import CLASSES, TreeProfile, classes, numbers, starts
from kvferry.errors import BitstreamError, FingerprintError, InputError, KVFerryWarning
from kvferry.fit.tree import make_tree, tree_bytes
from kvferry.recipe import Recipe, compress, decompress
from kvferry.rope import Rotary
from tests.codecs.test_transform import error

LAYERS, HEADS, DIM = 4, 2, 8
BLOCKS, WIDTH = 2 * LAYERS * HEADS, 2 * LAYERS * HEADS * DIM
PRINT = "ef" * 16
ROTARY = Rotary(0.5 ** torch.arange(DIM // 2).float())


def layout(n: int, pictures: int = 6) -> PromptLayout:
    """Five tokens of template, a picture, context, a question of three, two tokens of template."""
    role = np.full(n, Role.CONTEXT, np.uint8)
    role[:5] = role[-2:] = Role.SPECIAL
    role[-5:-2] = Role.QUESTION
    modality = np.zeros(n, np.uint8)
    modality[5 : 5 + pictures] = 1
    tokens = (np.arange(n) * 7 % 11).astype(np.int32)
    return PromptLayout(tokens, modality, role, np.arange(n, dtype=np.int32)[None])


def mixing(seed: int = 0) -> torch.Tensor:
    """Columns of falling size that mix all layers, ``[WIDTH, WIDTH]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, WIDTH, generator=generator) * 2.0 ** torch.linspace(3, -5, WIDTH)


def rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)) @ mixing().T


def make() -> TreeProfile:
    weight = torch.eye(DIM).expand(BLOCKS, DIM, DIM) * 2.0
    visual, text = (make_tree(torch.full((WIDTH,), m), rows(3000, s), weight, LAYERS) for m, s in ((1.0, 5), (-1.0, 6)))
    prompt = layout(30)
    known = words(prompt)[6 + 5 : 6 + 8].unique()
    means = text.forward(rows(len(known), 7), 20)
    digests = np.sort(starts(prompt, 5))
    exact = rows(len(digests), 8)
    steps = torch.tensor([0, 8, -4, 10, 24, 3], dtype=torch.int16)
    start = torch.from_numpy(digests)
    rotary, shape = (ROTARY, None, ROTARY, ROTARY), (LAYERS, HEADS, DIM)
    return TreeProfile(PRINT, visual, text, known, means, start, exact, steps, rotary, shape, {"n": 1})


def drawn(profile: TreeProfile, n: int = 60, seed: int = 1, pictures: int = 6) -> KVCache:
    """A cache of such statistics that begins as the template says."""
    prompt = layout(n, pictures)
    x = rows(n, seed) + torch.where(torch.from_numpy(prompt.visual), 1.0, -1.0)[:, None]
    at = torch.searchsorted(profile.starts, torch.from_numpy(starts(prompt, 5)))
    x[: len(at)] = profile.start_means[at]
    keys, values = x.view(n, LAYERS, HEADS, 2, DIM).permute(3, 1, 2, 0, 4)
    where, index = torch.from_numpy(prompt.positions).long(), torch.arange(n).expand(HEADS, -1).contiguous()
    turned = [k if r is None else r.rotate(k, where) for k, r in zip(keys, profile.rotary, strict=True)]
    return KVCache(tuple(LayerCache(k, v, index) for k, v in zip(turned, values, strict=True)), prompt, n, PRINT)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "tree.profile"
    path.write_bytes(make().to_bytes())
    return path


def read(file: Path) -> TreeProfile:
    profile, _ = profiles.read(file)
    assert isinstance(profile, TreeProfile)
    return profile


def test_nothing_is_lost_on_the_way_there_and_back() -> None:
    tree, x = make().text, rows(20, 3)
    assert tree is not None
    torch.testing.assert_close(tree.inverse(tree.forward(x, WIDTH)), x, rtol=1e-3, atol=1e-3)
    leading = tree.forward(x, 30)
    torch.testing.assert_close(leading, tree.forward(x, WIDTH)[:, :30])
    assert float(leading.square().sum()) > 0.8 * float(tree.forward(x, WIDTH).square().sum())


def test_errors_are_weighed_alike_in_every_stage() -> None:
    """Twice the weight: an error of length 1 in a coefficient is one of 1/2 in keys and values."""
    tree = make().text
    assert tree is not None
    errors = tree.inverse(torch.eye(WIDTH)).norm(dim=1)
    torch.testing.assert_close(errors, torch.full((WIDTH,), 0.5), rtol=1e-4, atol=1e-4)


def test_every_ratio_is_reached_and_quality_never_saturates(file: Path) -> None:
    cache = drawn(read(file), 400)
    sizes, errors = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVFerryWarning)
        for ratio in (2, 4, 8, 16, 32, 64, 128, 200):
            blob = compress(cache, f"full|transform:{ratio}@{file}")
            sizes.append(len(blob))
            errors.append(error(cache, decompress(blob)))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 1e-4
    assert sizes[0] > 8 * sizes[4]


def test_bytes_are_what_the_ratio_promises(file: Path) -> None:
    """Of a class whose step is the ratio's: context, where there are no pictures in the profile."""
    profile = replace(read(file), visual=None, steps=torch.zeros(len(CLASSES), dtype=torch.int16))
    path = file.with_name("text.profile")
    path.write_bytes(profile.to_bytes())
    cache = drawn(profile, 400, pictures=0)
    for ratio in (4.0, 16.0):
        reader = Reader()
        reader.feed(compress(cache, f"full|transform:{ratio:g}@{path}"))
        bits = 8 * sum(f.payload_bytes for f in reader.frames) / (395 * WIDTH)
        assert bits == pytest.approx(16 / ratio, rel=0.15)


def test_a_template_is_exact_and_costs_next_to_nothing(file: Path) -> None:
    profile = read(file)
    cache = drawn(profile)
    back = decompress(compress(cache, f"full|transform:64@{file}"))
    for a, b in zip(cache, back, strict=True):
        torch.testing.assert_close(b.values[:, :5].float(), a.values[:, :5], rtol=0.01, atol=0.01)
    same = compress(cache, f"full|transform:4@{file}")
    for layer in cache:
        layer.values[:, :4] += 50.0
    other = compress(cache, f"full|transform:4@{file}")
    assert len(same) < len(other)
    for a, b in zip(cache, decompress(other), strict=True):
        assert float((b.values[:, :4].float() - a.values[:, :4]).abs().max()) < 5


def test_classes_have_steps_of_their_own(file: Path) -> None:
    prompt = layout(30)
    names = [CLASSES[i] for i in classes(prompt)]
    assert names[:5] == ["sinks"] * 4 + ["template"]
    assert names[5:12] == ["visual"] * 6 + ["context"]
    assert names[-5:] == ["question"] * 3 + ["tail"] * 2
    cache = drawn(read(file), 200)
    back = decompress(compress(cache, f"full|transform:8@{file}"))
    off = torch.stack([(a.values - b.values.float()).square().mean((0, 2)) for a, b in zip(cache, back, strict=True)])
    kinds = torch.from_numpy(classes(cache.layout))
    assert float(off[:, kinds == 1].mean()) < 0.5 * float(off[:, kinds == 0].mean())


def test_apply_is_the_same_as_the_wire_and_so_are_tiers(file: Path) -> None:
    cache = drawn(read(file))
    recipe = Recipe.parse(f"knorm@0.5,budget=shared|transform:8@{file}")
    short = recipe.apply(cache)
    for tiers in (1, 3):
        for a, b in zip(decompress(compress(cache, recipe, tiers=tiers)), short, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


def test_tokens_without_a_basis_are_refused(file: Path) -> None:
    profile = replace(read(file), visual=None)
    path = file.with_name("blind.profile")
    path.write_bytes(profile.to_bytes())
    with pytest.raises(InputError, match="without visual tokens"):
        compress(drawn(profile), f"full|transform@{path}")


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_damaged_payloads_end_in_named_errors(file: Path, data: st.DataObject) -> None:
    profile, _ = profile_store.add(file)
    assert isinstance(profile, TreeProfile)
    cache = drawn(profile, 30)
    codec = Recipe.parse(f"full|transform:4@{file}").codec
    keys, values = (torch.stack([getattr(x, w) for x in cache]) for w in ("keys", "values"))
    where = cache.layers[0].positions[0]
    payload = bytearray(codec.encoder(PRINT).encode_tokens(keys, values, where, cache.layout))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(payload)))
    try:
        got = codec.decoder(PRINT).decode_tokens(bytes(payload[:cut]), tuple(keys.shape), where, cache.layout)
    except (BitstreamError, FingerprintError):
        return
    assert all(bool(x.isfinite().all()) for x in got)


def test_a_7b_profile_is_small_by_formula() -> None:
    assert tree_bytes(28, 4, 128) < 80e6
    assert tree_bytes(28, 2, 128) < tree_bytes(28, 4, 128)
    text = make().text
    assert text is not None
    held = sum(x.numel() for x in (text.leaves, text.layers, text.joint))
    assert held == numbers(LAYERS, HEADS, DIM, DIM, len(text.joint) // LAYERS)


def test_a_file_reads_as_it_was_written(file: Path) -> None:
    was, now = make(), read(file)
    assert Transform.reachable(now) == Transform.reachable(was)
    assert torch.equal(now.starts, was.starts)
    assert torch.equal(now.words, was.words)
