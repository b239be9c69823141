"""The compiled kernels and the plain path give the same bytes and the same numbers."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kvferry import codecs
from kvferry.codecs import Integer, packing
from kvferry.codecs.integer import quantize, restore
from kvferry.errors import InputError
from tests.codecs.test_codecs import LAYOUT

pytest.importorskip("numba", reason="the plain path is all there is without numba")


@contextmanager
def path(compiled: bool) -> Iterator[None]:
    """Everything by the kernels, or nothing."""
    with patch.object(packing, "_WORTH", 1 if compiled else math.inf):
        assert (packing.compiled(1) is not None) == compiled
        yield


@st.composite
def caches(draw: st.DrawFn) -> torch.Tensor:
    """A side of a cache: blocks of 64 tokens, rests of them, odd widths, any dtype, from subnormal to the largest."""
    shape = draw(st.tuples(st.integers(1, 3), st.sampled_from([0, 1, 7, 63, 64, 65, 130]), st.integers(1, 20)))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]))
    words = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 1 << 16, shape).astype(np.uint16)
    lowest, spread = draw(st.sampled_from([(0, 1), (0, 3), (1, 8), (100, 60), (120, 8), (248, 5), (0, 253)]))
    exponent = lowest + (words >> 7) % (spread + 1)
    bits = (words & 0x807F) | (exponent << 7).astype(np.uint16)
    numbers = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return numbers.to(dtype).clamp(-60000, 60000).to(dtype) if dtype == torch.float16 else numbers.to(dtype)


@settings(max_examples=80, deadline=None)
@given(caches(), st.integers(1, 8), st.booleans())
def test_payloads_and_numbers_are_the_same(keys: torch.Tensor, bits: int, transposed: bool) -> None:
    heads, kept = keys.shape[:2]
    values = keys.flip(2)[..., : 1 + keys.shape[2] // 2]
    keys = keys.mT.contiguous().mT if transposed else keys
    positions = torch.arange(kept).expand(heads, -1)
    seen = []
    for compiled in (True, False):
        with path(compiled):
            payload = Integer(bits).encode(0, keys, values, positions, LAYOUT)
            shapes = tuple(keys.shape), tuple(values.shape)
            numbers = Integer(bits).decode(0, payload, *shapes, positions, LAYOUT)
            seen.append((payload, *(x.view(torch.int16).tolist() for x in numbers)))
    assert seen[0] == seen[1]


def test_range_coded_numbers_decode_alike() -> None:
    """They come channel by channel out of a coder that works token by token."""
    keys = torch.randn(2, 70, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions, codec, seen = torch.arange(70).expand(2, -1), Integer(3, "range"), []
    for compiled in (True, False):
        with path(compiled):
            payload = codec.encode(0, keys, keys, positions, LAYOUT)
            seen.append((payload, codec.decode(0, payload, (2, 70, 6), (2, 70, 6), positions, LAYOUT)))
    assert len(payload) < len(Integer(3).encode(0, keys, keys, positions, LAYOUT))
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(x, y) for x, y in zip(seen[0][1], seen[1][1], strict=True))


@pytest.mark.parametrize("bits", range(2, 9))
def test_ties_round_to_even(bits: int) -> None:
    """Every number is a whole or half multiple of the scale, which is no power of two where bfloat16 has room."""
    half, scale = 2 ** (bits - 1), 1.25 if bits < 6 else 1.0
    steps = torch.arange(-2 * half + 2, 2 * half - 1) / 2
    tensor = (steps * scale)[None, :, None].expand(1, -1, 2).clone()
    tensor[..., 1] = (half - 1) * scale
    for compiled in (True, False):
        with path(compiled):
            words, numbers = quantize(0, "keys", tensor.bfloat16(), bits)
        assert set(words.ravel()) == {0x3FA0 if scale > 1 else 0x3F80}
        assert (numbers[0, 0] == steps.round().numpy() + half).all()


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(2, 8), st.sampled_from([0x7F80, 0xFFC1, 0x7F7F, 0x0001, 0x8000]))
def test_any_scale_decodes_alike(seed: int, bits: int, odd: int) -> None:
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 1 << bits, (2, 6, 70)).astype(np.uint8)
    words = random.integers(0, 0x7F80, (2, 70)).astype(np.uint16)
    words[1, 3] = odd
    seen = []
    for compiled in (True, False):
        with path(compiled):
            seen.append(restore(words, numbers, bits, (2, 70, 6)).view(torch.int16))
    assert torch.equal(*seen)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.35e38])
@pytest.mark.parametrize("where", [(0, 0, 0), (1, 69, 4)])
def test_what_is_not_finite_is_refused(bad: float, where: tuple[int, int, int]) -> None:
    tensor = torch.zeros(2, 70, 5, dtype=torch.bfloat16)
    tensor[where] = bad
    for compiled in (True, False):
        with path(compiled), pytest.raises(InputError, match="values of layer 3"):
            quantize(3, "values", tensor, 4)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 99))
def test_nibbles_pack_alike(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 16, count).astype(np.uint8)
    with path(False):
        plain = packing.pack(values, 4)
    with path(True):
        assert packing.pack(values, 4).tobytes() == plain.tobytes()
        assert (packing.unpack(plain[:], 4, count) == values).all()


def test_without_numba_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    packing._kernels.cache_clear()
    with monkeypatch.context() as missing:
        missing.delattr(codecs, "kernels", raising=False)
        missing.delitem(sys.modules, "kvferry.codecs.kernels", raising=False)
        missing.setitem(sys.modules, "numba", None)
        assert packing.compiled(1 << 30) is None
    packing._kernels.cache_clear()
    assert packing.compiled(1 << 30) is not None
