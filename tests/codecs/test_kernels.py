"""The compiled kernels and the plain path give the same bytes and the same numbers."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import kvferry
from kvferry import codecs
from kvferry.codecs import Integer, packing
from kvferry.codecs.integer import ByToken
from kvferry.codecs.levels import quantize, quantize_packed, restore, restore_packed
from kvferry.codecs.side import bfloat16_of
from kvferry.errors import CorruptError, InputError
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


@settings(max_examples=120, deadline=None)
@given(
    caches(),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([Integer, ByToken]),
    st.sampled_from(["packed", "packed", "range"]),
)
def test_payloads_and_numbers_are_the_same(
    keys: torch.Tensor, bits: int, transposed: bool, kind: type[Integer], coder: Literal["packed", "range"]
) -> None:
    heads, kept = keys.shape[:2]
    values = keys.flip(2)[..., : 1 + keys.shape[2] // 2]
    keys = keys.mT.contiguous().mT if transposed else keys
    positions = torch.arange(kept).expand(heads, -1)
    seen = []
    for compiled in (True, False):
        with path(compiled):
            payload = kind(bits, coder).encode(0, keys, values, positions, LAYOUT)
            shapes = tuple(keys.shape), tuple(values.shape)
            numbers = kind(bits, coder).decode(0, payload, *shapes, positions, LAYOUT)
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
        assert (numbers[0, :, 0] == steps.round().numpy() + half).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("octave", [0x0480, 0x3F80, 0x7E80])
def test_a_reciprocal_rounds_as_the_quotient(bits: int, octave: int) -> None:
    """Numbers of all significands in 11 octaves over a hundred scales and more, against exact quotients."""
    peaks = octave + np.arange(128)
    words = np.maximum(peaks[:, None] - np.arange(11 * 128), 0).astype(np.uint16)
    words[:, 1::2] |= 0x8000
    tensor = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)[None]
    with path(True):
        scales, levels = quantize(0, "keys", tensor, bits)
    assert len(np.unique(scales)) > 100
    exact = tensor[0].double() / bfloat16_of(scales[0]).double()[:, None]
    assert (levels[0] == exact.round().numpy() + 2 ** (bits - 1)).all()


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(2, 8), st.sampled_from([0x7F80, 0xFFC1, 0x7F7F, 0x0001, 0x8000]))
def test_any_scale_decodes_alike(seed: int, bits: int, odd: int) -> None:
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 1 << bits, (2, 70, 6)).astype(np.uint8)
    words = random.integers(0, 0x7F80, (2, 70)).astype(np.uint16)
    words[1, 3] = odd
    packed, seen = packing.pack(numbers.reshape(-1), bits), []
    for compiled in (True, False):
        if odd & 0x7FFF >= 0x7F80:
            for read, levels in ((restore, numbers), (restore_packed, packed)):
                with path(compiled), pytest.raises(CorruptError, match="NaN"):
                    read(words, levels, bits, (2, 70, 6))
            continue
        with path(compiled):
            seen.append(restore(words, numbers, bits, (2, 70, 6)).view(torch.int16))
            seen.append(restore_packed(words, packed, bits, (2, 70, 6)).view(torch.int16))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("bits", [4, 8])
def test_tensors_may_begin_anywhere(bits: int) -> None:
    """Not even at a multiple of four bytes, as a slice of a longer one may."""
    flat = torch.randn(2 * 70 * 6 + 1).bfloat16()
    with path(True):
        odd = quantize_packed(0, "keys", flat[1:].view(2, 70, 6), bits)
        even = quantize_packed(0, "keys", flat[1:].clone().view(2, 70, 6), bits)
    assert all(map(np.array_equal, odd, even))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.35e38])
@pytest.mark.parametrize("where", [(0, 0, 0), (1, 69, 4)])
def test_what_is_not_finite_is_refused(bad: float, where: tuple[int, int, int]) -> None:
    tensor = torch.zeros(2, 70, 5, dtype=torch.bfloat16)
    tensor[where] = bad
    for compiled in (True, False):
        with path(compiled), pytest.raises(InputError, match="values of layer 3"):
            quantize(3, "values", tensor, 4)


def test_without_numba_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    packing._kernels.cache_clear()
    with monkeypatch.context() as missing:
        missing.delattr(codecs, "kernels", raising=False)
        missing.delitem(sys.modules, "kvferry.codecs.kernels", raising=False)
        missing.setitem(sys.modules, "numba", None)
        assert packing.compiled(1 << 30) is None
    packing._kernels.cache_clear()
    assert packing.compiled(1 << 30) is not None


ALONE = """
import numpy as np, torch
from kvferry.codecs import kernels, levels
assert kernels.quantize.stats.cache_path is None and kernels.restore.stats.cache_path is None
numbers = torch.arange(-65536, 65536).bfloat16().view(4, 256, 128)
words, packed = levels.quantize_packed(0, "keys", numbers, 4)
back = levels.restore_packed(words, packed, 4, (4, 256, 128))
print(words.tobytes().hex(), packed.tobytes().hex(), back.view(torch.int16).numpy().tobytes().hex())
"""


def test_where_nothing_can_be_kept_the_kernels_still_run(tmp_path: Path) -> None:
    """A copy of the package, with files where numba would make folders: that stops even the root user."""
    shutil.copytree(Path(kvferry.__file__).parent, tmp_path / "kvferry", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kvferry" / "codecs" / "__pycache__").touch()
    home = tmp_path / "home"
    home.touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment |= {"PYTHONPATH": str(tmp_path), "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    said = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    numbers = torch.arange(-65536, 65536).bfloat16().view(4, 256, 128)
    with path(False):
        words, packed = quantize_packed(0, "keys", numbers, 4)
        back = restore_packed(words, packed, 4, (4, 256, 128)).view(torch.int16).numpy()
    assert said.stdout.split() == [x.tobytes().hex() for x in (words, packed, back)]
