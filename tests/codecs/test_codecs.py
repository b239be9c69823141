"""Every codec, over shapes, dtypes and bits."""

import math
from typing import Literal
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from kvferry.cache import PromptLayout
from kvferry.codecs import BF16, CODECS, Codec, Integer, codec_text, for_stage, packing, parse_codec
from kvferry.codecs.packing import join_words, pack, packed_size, split_words, unpack
from kvferry.errors import CorruptError, InputError, RecipeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = {n: x for n, x in CODECS.items() if not (hasattr(x, "encoder") or hasattr(x, "decoder"))}
"""Those that need no profile and no memory of a stream."""
LAYOUT = PromptLayout(np.zeros(9, np.int32), np.zeros(9, np.uint8), np.zeros(9, np.uint8), np.arange(9)[None])


def round_trip(codec: Codec, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bytes]:
    positions = torch.arange(keys.shape[1]).expand(keys.shape[0], -1)
    payload = codec.encode(3, keys, values, positions, LAYOUT)
    return *codec.decode(3, payload, tuple(keys.shape), tuple(values.shape), positions, LAYOUT), payload


@st.composite
def tensors(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    heads, kept = draw(st.integers(1, 3)), draw(st.integers(0, 9))
    key_dim, value_dim = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([0.0, 1e-6, 1.0, 300.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    make = lambda dim: (torch.randn(heads, kept, dim, generator=generator) * scale).to(dtype)  # noqa: E731
    return make(key_dim), make(value_dim)


@given(tensors(), st.integers(2, 8))
def test_integers_stay_within_half_a_step(pair: tuple[torch.Tensor, torch.Tensor], bits: int) -> None:
    keys, values, payload = round_trip(Integer(bits), *pair)
    for before, after in zip(pair, (keys, values), strict=True):
        assert after.dtype == torch.bfloat16
        peak = before.float().abs().amax(-1, keepdim=True)
        step = peak / (2 ** (bits - 1) - 1) * (1 + 2**-7)
        rounding = 2**-8 * peak + 1e-38
        assert ((before.float() - after.float()).abs() <= step / 2 + rounding).all()
    vectors = pair[0].shape[0] * pair[0].shape[1]
    expected = 4 * vectors + sum(math.ceil(t.numel() * bits / 8) for t in pair)
    assert len(payload) == expected


@given(tensors(), st.integers(1, 8))
def test_a_range_coder_changes_bytes_not_numbers(pair: tuple[torch.Tensor, torch.Tensor], bits: int) -> None:
    *packed, payload = round_trip(Integer(bits), *pair)
    *coded, shorter = round_trip(Integer(bits, "range"), *pair)
    assert all(map(torch.equal, packed, coded))
    assert len(shorter) <= len(payload)


@given(tensors(), st.integers(1, 8), st.sampled_from(["packed", "range"]))
def test_without_a_lossless_stage_only_the_order_differs(
    pair: tuple[torch.Tensor, torch.Tensor], bits: int, coder: Literal["packed", "range"]
) -> None:
    staged, bare = (for_stage(Integer(bits, coder), lossless) for lossless in (True, False))
    assert staged == Integer(bits, coder)
    assert codec_text(bare) == codec_text(staged)
    *by_channel, payload = round_trip(staged, *pair)
    *by_token, other = round_trip(bare, *pair)
    assert all(map(torch.equal, by_channel, by_token))
    assert len(payload) == len(other)


def test_a_range_coder_takes_what_channels_have_in_common() -> None:
    tensor = torch.randn(2, 1, 16).expand(2, 300, 16) + 0.1 * torch.randn(2, 300, 16)
    sizes = [len(round_trip(Integer(4, coder), tensor, tensor)[2]) for coder in ("packed", "range")]
    assert sizes[1] < 0.6 * sizes[0]


@given(st.binary(max_size=60))
def test_any_bytes_give_numbers_or_are_corrupt(payload: bytes) -> None:
    shape = (2, 3, 5)
    for codec in (Integer(3, "range"), *PLAIN.values()):
        try:
            keys, values = codec.decode(3, payload, shape, shape, torch.arange(3).expand(2, -1), LAYOUT)
        except CorruptError:
            continue
        assert keys.shape == values.shape == shape


@given(tensors())
def test_one_bit_keeps_sign_and_mean_magnitude(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    for before, after in zip(pair, round_trip(Integer(1), *pair)[:2], strict=True):
        mean = before.float().abs().mean(-1, keepdim=True).expand_as(before)
        assert torch.allclose(after.float().abs(), mean, rtol=2**-6, atol=1e-38)
        assert (after.float() * before.float() >= 0).all()


@given(tensors())
def test_bf16_rounds_once(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    keys, values, payload = round_trip(BF16(), *pair)
    assert torch.equal(keys, pair[0].to(torch.bfloat16))
    assert torch.equal(values, pair[1].to(torch.bfloat16))
    assert len(payload) == 2 * (keys.numel() + values.numel())


@pytest.mark.parametrize("codec", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_is_refused_by_name(codec: Codec, bad: float, dtype: torch.dtype) -> None:
    keys = torch.ones(2, 3, 4, dtype=dtype)
    values = keys.clone()
    values[1, 2, 3] = bad
    with pytest.raises(InputError, match="the values of layer 3"):
        round_trip(codec, keys, values)
    with pytest.raises(InputError, match="the keys of layer 3"):
        round_trip(codec, values, keys)


@pytest.mark.parametrize("codec", PLAIN.values(), ids=PLAIN)
def test_beyond_bfloat16_is_refused(codec: Codec) -> None:
    big = torch.full((1, 1, 2), torch.finfo(torch.float32).max)
    with pytest.raises(InputError, match="layer 3"):
        round_trip(codec, big, big)


@pytest.mark.parametrize("codec", PLAIN.values(), ids=PLAIN)
def test_extremes_of_the_range_survive(codec: Codec) -> None:
    for peak in (3.29e38, 1e-38):
        tensor = torch.tensor([[[peak, -peak, peak]]])
        keys, _, _ = round_trip(codec, tensor, tensor)
        assert torch.allclose(keys.float(), tensor, rtol=0.3 if codec.name == "turbo" else 0.02)


@pytest.mark.parametrize("codec", PLAIN.values(), ids=PLAIN)
def test_a_payload_of_the_wrong_size_is_corrupt(codec: Codec) -> None:
    keys = torch.randn(2, 3, 5)
    _, _, payload = round_trip(codec, keys, keys)
    positions = torch.arange(3).expand(2, -1)
    for wrong in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(CorruptError, match="layer 3"):
            codec.decode(3, wrong, (2, 3, 5), (2, 3, 5), positions, LAYOUT)


@pytest.mark.parametrize("codec", PLAIN.values(), ids=PLAIN)
def test_memory_order_does_not_matter(codec: Codec) -> None:
    keys = torch.randn(2, 4, 6)
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert round_trip(codec, keys, keys)[2] == round_trip(codec, strided, strided)[2]


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 1000), st.sampled_from([8, 16, packing._PART]))
def test_packing_is_exact_and_tight(bits: int, count: int, seed: int, part: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    with patch.object(packing, "_PART", part):
        packed = pack(values, bits)
        assert np.array_equal(unpack(packed, bits, count), values)
    assert packed.nbytes == packed_size(count, bits) == math.ceil(count * bits / 8)
    number = sum(int(value) << bits * i for i, value in enumerate(values))
    assert packed.tobytes() == number.to_bytes(packed.nbytes, "little")


@given(st.lists(st.integers(0, 65535), max_size=20))
def test_words_survive(words: list[int]) -> None:
    array = np.array(words, np.uint16)
    octets = np.frombuffer(split_words(array), np.uint8)
    assert np.array_equal(join_words(octets), array)


@pytest.mark.parametrize("name", CODECS)
def test_text_of_a_codec(name: str) -> None:
    text = codec_text(parse_codec(name))
    assert text.partition(":")[0] == name
    assert parse_codec(text) == parse_codec(name) == CODECS[name]


def test_unknown_codecs_name_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'int8'"):
        parse_codec("int88")
    with pytest.raises(RecipeError, match="no argument"):
        parse_codec("int8:3")
    with pytest.raises(RecipeError, match="choose from coder"):
        parse_codec("int8,bits=4")
    with pytest.raises(InputError, match="int1 to int8"):
        Integer(9)
