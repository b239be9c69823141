"""Truncated SVD: exact where the rank suffices, best among matrices of its rank, and never longer than direct."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import kvferry
from kvferry import compress, decompress
from kvferry.cache import Modality
from kvferry.codecs import SVD, Integer, codec_text, parse_codec, profile_store
from kvferry.errors import CorruptError, FingerprintError, InputError, RecipeError
from kvferry.testbed import samples
from tests import helpers
from tests.codecs.test_codecs import round_trip, tensors

PROMPT = helpers.layout(rows=8, columns=8)
VISUAL = np.flatnonzero(PROMPT.modality == Modality.IMAGE)


def through(codec: SVD, tensor: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, bytes]:
    shape = tuple(tensor.shape)
    payload = codec.encode(3, tensor, tensor, positions, PROMPT)
    keys, values = codec.decode(3, payload, shape, shape, positions, PROMPT)
    assert torch.equal(keys, values)
    return keys.float(), payload


def low_rank(tokens: int, rank: int, heads: int = 2, dim: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, heads * dim, generator=generator)
    return flat.reshape(tokens, heads, dim).permute(1, 0, 2).contiguous()


def test_each_modality_has_a_rank_of_its_own() -> None:
    tokens = len(PROMPT)
    tensor = low_rank(tokens, 3)
    text = np.setdiff1d(np.arange(tokens), VISUAL)
    tensor[:, text] = torch.randn(2, len(text), 32)
    keys, payload = through(SVD(3), tensor, torch.arange(tokens).expand(2, -1))
    error = (keys - tensor).square().mean((0, 2)) / tensor.square().mean()
    assert error[VISUAL].max() < 1e-3
    assert error[text].mean() > 0.1
    assert len(payload) < len(round_trip(Integer(8), tensor, tensor)[2])


def test_the_cut_is_the_best_of_its_rank() -> None:
    tensor = torch.randn(2, len(VISUAL), 32, generator=torch.Generator().manual_seed(1))
    keys, _ = through(SVD(8), tensor, torch.from_numpy(VISUAL).expand(2, -1))
    s = torch.linalg.svdvals(tensor.permute(1, 0, 2).reshape(len(VISUAL), -1))
    least = float(s[8:].square().sum())
    assert least <= float((keys - tensor).square().sum()) <= 1.01 * least


def test_energy_takes_the_fewest_components_that_hold_it() -> None:
    tensor = low_rank(len(VISUAL), 5)
    positions = torch.from_numpy(VISUAL).expand(2, -1)
    assert len(through(SVD(energy=0.9999), tensor, positions)[1]) == len(through(SVD(5), tensor, positions)[1])
    keys, _ = through(SVD(energy=0.8), tensor, positions)
    lost = float((keys - tensor).square().sum() / tensor.square().sum())
    assert 0.0 < lost < 0.21


def test_heads_that_keep_different_tokens_are_taken_apart() -> None:
    tensor = low_rank(20, 2)
    positions = torch.stack([torch.from_numpy(VISUAL[:20]), torch.from_numpy(VISUAL[20:40])])
    keys, _ = through(SVD(2), tensor, positions)
    assert torch.allclose(keys, tensor, atol=0.02 * float(tensor.abs().max()))
    ragged = low_rank(40, 2, heads=1)
    keys, _ = through(SVD(2), ragged, positions.reshape(1, -1))
    assert torch.allclose(keys, ragged, atol=0.02 * float(ragged.abs().max()))


@given(tensors(), st.sampled_from([1, 2, 64]))
def test_never_longer_than_direct(pair: tuple[torch.Tensor, torch.Tensor], rank: int) -> None:
    payload = round_trip(SVD(rank), *pair)[2]
    direct = len(round_trip(Integer(8), *pair)[2])
    assert len(payload) <= direct + 6 * 2 * pair[0].shape[0]
    for before, after in zip(pair, round_trip(SVD(64), *pair)[:2], strict=True):
        peak = before.float().abs().max() if before.numel() else 0.0
        assert ((after.float() - before.float()).abs() <= 0.03 * peak + 1e-38).all()


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_give_numbers_or_are_corrupt(payload: bytes, real: bool) -> None:
    tensor, positions = low_rank(20, 2, dim=5), torch.from_numpy(VISUAL[:20]).expand(2, -1)
    if real:
        whole = bytearray(SVD(2).encode(3, tensor, tensor, positions, PROMPT))
        whole[: len(payload)] = payload[: len(whole)]
        payload = bytes(whole)
    try:
        keys, values = SVD(2).decode(3, payload, (2, 20, 5), (2, 20, 5), positions, PROMPT)
    except CorruptError:
        return
    assert keys.shape == values.shape == (2, 20, 5)


def test_text() -> None:
    assert codec_text(parse_codec("svd:8,bits=6")) == "svd:8,bits=6"
    assert parse_codec("svd,energy=0.95") == SVD(energy=0.95)
    for wrong in ("svd:0", "svd,energy=2", "svd,bits=1", "svd:70000"):
        with pytest.raises(RecipeError):
            parse_codec(wrong)


def test_unturned_keys_lose_less_and_need_their_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = kvferry.load("testbed/edge")
    scene = next(iter(samples("validation", 1)))
    prefilled = vlm.prefill(scene.images, scene.question, recipe="leaveout@0.5|bf16")

    def lost(selection: str, codec: str) -> float:
        """Mean over layers of the share of the keys' energy; heads keep tokens of their own in ``leaveout``."""
        kept, whole = (decompress(compress(prefilled, f"{selection}|{x}")).layers for x in (codec, "bf16"))
        pairs = [(x.keys.float(), y.keys.float()) for x, y in zip(kept, whole, strict=True)]
        return sum(float((x - y).square().sum() / y.square().sum()) for x, y in pairs) / len(pairs)

    for selection in ("full", "leaveout@0.5,budget=shared"):
        assert lost(selection, "svd:8,keys=unturned") < lost(selection, "svd:8")
    for selection in ("full", "leaveout@0.5"):
        assert lost(selection, "svd,energy=1,keys=unturned") < 1.5 * lost(selection, "svd,energy=1") + 1e-4
    blob = compress(prefilled, "full|svd:8,keys=unturned")
    monkeypatch.setattr(profile_store, "_known", {})
    monkeypatch.setattr(profile_store, "_look_around", lambda: None)
    with pytest.raises(FingerprintError, match="which is not here"):
        decompress(blob)
    with pytest.raises(InputError, match="no profile"):
        compress(prefilled, "full|svd:8,keys=unturned")


def test_a_profile_for_other_keys_is_refused() -> None:
    vlm = kvferry.load("testbed/edge")
    coder = SVD(8, keys="unturned").encoder(vlm.fingerprint)
    tensor = torch.zeros(2, len(PROMPT), 16)
    positions = torch.arange(len(PROMPT)).expand(2, -1)
    with pytest.raises(InputError, match="do not fit a profile"):
        coder.encode(0, tensor, tensor, positions, PROMPT)
    decoder = SVD(8, keys="unturned").decoder(vlm.fingerprint)
    for payload, match in ((b"", "without the digest"), (coder.digest, "do not fit their profile")):
        with pytest.raises(CorruptError, match=match):
            decoder.decode(0, payload, (2, len(PROMPT), 16), (2, len(PROMPT), 16), positions, PROMPT)
    with pytest.raises(InputError, match="does not encode"):
        decoder.encode(0, tensor, tensor, positions, PROMPT)
