"""KIVI, TurboQuant and FP8: what each promises about its error and its bytes."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy import integrate, stats

from kvferry.codecs import FP8, KIVI, Codec, Turbo, codec_text, parse_codec
from kvferry.codecs.turbo import codebook, rotate
from kvferry.errors import CorruptError, InputError, RecipeError
from tests.codecs.test_codecs import DTYPES, LAYOUT, round_trip, tensors

CALIBRATION_FREE = (
    *(KIVI(bits, group, residual) for bits, group, residual in [(1, 32, 32), (2, 4, 3), (3, 2, 0), (8, 5, 0)]),
    *(Turbo(bits) for bits in (1, 2.5, 3, 8)),
    FP8(),
    FP8("e5m2"),
)


def bounds(lines: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest number of every entry's group along the last axis, by a plain loop."""
    low, high = torch.empty_like(lines), torch.empty_like(lines)
    for start in range(0, lines.shape[-1], group):
        part = lines[..., start : start + group]
        low[..., start : start + group] = part.amin(-1, keepdim=True)
        high[..., start : start + group] = part.amax(-1, keepdim=True)
    return low, high


@given(tensors(), st.integers(1, 8), st.integers(2, 6), st.integers(0, 4))
def test_kivi_stays_within_half_a_step(
    pair: tuple[torch.Tensor, torch.Tensor], bits: int, group: int, residual: int
) -> None:
    keys, values, payload = round_trip(KIVI(bits, group, residual), *pair)
    heads, kept, key_dim = keys.shape
    window = min(kept, residual)
    older = kept - window
    for before, after, by_channel in ((pair[0], keys, True), (pair[1], values, False)):
        assert torch.equal(after[:, older:], before[:, older:].to(torch.bfloat16))
        old, new = before[:, :older].float(), after[:, :older].float()
        low, high = bounds(old.mT if by_channel else old, group)
        low, high = (low.mT, high.mT) if by_channel else (low, high)
        widest = torch.maximum(low.abs(), high.abs())
        step = (high - low + 2**-6 * widest * (before.dtype != torch.bfloat16)) / (2**bits - 1)
        assert ((old - new).abs() <= step / 2 * (1 + 2**-20) + 2**-8 * widest + 1e-38).all()
    value_dim = values.shape[2]
    groups = heads * (key_dim * math.ceil(older / group) + older * math.ceil(value_dim / group))
    numbers = sum(math.ceil(heads * older * dim * bits / 8) for dim in (key_dim, value_dim))
    assert len(payload) == 4 * groups + numbers + 2 * heads * window * (key_dim + value_dim)


def test_kivi_keeps_the_ends_of_a_group_exactly() -> None:
    keys = torch.tensor([-3.0, 1.0, 0.5, 7.0]).bfloat16().reshape(1, 4, 1)
    restored = round_trip(KIVI(2, 4, 0), keys, keys)[0].flatten()
    assert restored.tolist() == pytest.approx([-3, 1 / 3, 1 / 3, 7], rel=2**-8)
    assert restored[[0, 3]].tolist() == [-3, 7]


def test_kivi_treats_heads_end_to_end_as_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 9, 4, generator=generator) for _ in range(2))
    positions = torch.tensor([[0, 2, 3, 7, 8, 1, 3, 5, 6]])
    codec = KIVI(2, 2, 2)
    payload = codec.encode(0, keys, values, positions, LAYOUT)
    together = codec.decode(0, payload, (1, 9, 4), (1, 9, 4), positions, LAYOUT)
    for stretch in (slice(0, 5), slice(5, 9)):
        alone = round_trip(codec, keys[:, stretch], values[:, stretch])
        for whole, part in zip(together, alone[:2], strict=True):
            assert torch.equal(whole[:, stretch], part)


@given(tensors(), st.sampled_from(["e4m3", "e5m2"]))
def test_fp8_rounds_its_mantissa(pair: tuple[torch.Tensor, torch.Tensor], kind: str) -> None:
    keys, values, payload = round_trip(parse_codec(f"fp8,format={kind}"), *pair)
    mantissa, least, most = {"e4m3": (3, 2**-9, 448), "e5m2": (2, 2**-16, 57344)}[kind]
    for before, after in zip(pair, (keys, values), strict=True):
        peak = before.float().abs().amax(-1, keepdim=True)
        near_zero = least / 2 * peak / most * (1 + 2**-7)
        allowed = torch.maximum(before.float().abs() * 2 ** -(mantissa + 1), near_zero)
        assert ((before.float() - after.float()).abs() <= allowed + 2**-8 * before.float().abs() + 1e-38).all()
    assert len(payload) == 4 * keys.shape[0] * keys.shape[1] + keys.numel() + values.numel()


@pytest.mark.parametrize("dim", [1, 2, 5, 64, 80, 96, 128])
def test_a_rotation_turns_and_turns_back(dim: int) -> None:
    matrix = rotate(torch.eye(dim))
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim), atol=1e-6)
    assert torch.allclose(rotate(matrix, back=True), torch.eye(dim), atol=1e-6)
    assert dim < 3 or matrix.abs().max() < 0.9


def test_the_rotation_never_changes() -> None:
    matrix = rotate(torch.eye(8)) * 8
    assert matrix[0].round().int().tolist() == [0, 4, 0, 4, -4, 0, -4, 0]


@pytest.mark.parametrize("dim", [2, 3, 5, 80, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_codebook_is_lloyd_max(dim: int, bits: int) -> None:
    """Every level is the mean of its cell under the exact density, found here by adaptive quadrature over a Beta."""
    book = codebook(dim, bits).astype(float) / math.sqrt(dim)
    assert len(book) == 2**bits
    assert np.allclose(book, -book[::-1])
    assert (np.diff(book) > 0).all()
    beta = stats.beta((dim - 1) / 2, (dim - 1) / 2, loc=-1, scale=2)
    cuts = np.concatenate([[-1], (book[1:] + book[:-1]) / 2, [1]])
    mass = np.diff(beta.cdf(cuts))
    moment = [
        integrate.quad(lambda a: math.sin(a) * math.cos(a) ** (dim - 2), *np.arcsin(cuts[i : i + 2]))[0]
        for i in range(2**bits)
    ]
    total = integrate.quad(lambda a: math.cos(a) ** (dim - 2), -math.pi / 2, math.pi / 2)[0]
    assert book == pytest.approx(np.array(moment) / total / mass, abs=2e-4)


@pytest.mark.parametrize(("bits", "paper"), [(1, 0.36), (2, 0.117), (3, 0.034), (4, 0.0095), (2.5, 0.0758)])
@pytest.mark.parametrize("dim", [96, 128])
def test_turbo_reaches_the_papers_error_on_any_vector(bits: float, paper: float, dim: int) -> None:
    """Also on vectors of which one channel holds nearly everything, as keys often are."""
    keys = torch.randn(1, 2000, dim, generator=torch.Generator().manual_seed(0))
    values = keys * torch.where(torch.arange(dim) == 3, 50.0, 1.0)
    errors = [
        ((before - after.float()).square().sum(-1) / before.square().sum(-1)).mean()
        for before, after in zip((keys, values), round_trip(Turbo(bits), keys, values)[:2], strict=True)
    ]
    assert errors[0] == pytest.approx(paper, rel=0.06)
    assert errors[1] < 1.1 * paper


@given(tensors(), st.sampled_from([1, 1.5, 2, 2.5, 3, 5.5, 8]))
def test_turbo_counts_its_bytes_and_stays_finite(pair: tuple[torch.Tensor, torch.Tensor], bits: float) -> None:
    keys, values, payload = round_trip(Turbo(bits), *pair)
    vectors = keys.shape[0] * keys.shape[1]
    expected = 4 * vectors
    for before, after in zip(pair, (keys, values), strict=True):
        dim = before.shape[2]
        expected += math.ceil(vectors * math.ceil(dim / 2) * math.floor(bits) / 8) if bits % 1 else 0
        expected += math.ceil(vectors * (dim // 2 if bits % 1 else dim) * math.ceil(bits) / 8)
        length = before.float().norm(dim=-1)
        assert ((before.float() - after.float()).norm(dim=-1) <= 1.02 * length + 1e-38).all()
    assert len(payload) == expected


@pytest.mark.parametrize("codec", CALIBRATION_FREE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 0, 8, 5), (1, 1, 80, 96), (3, 70, 5, 7)])
def test_shapes_and_dtypes(codec: Codec, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    heads, kept, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(heads, kept, dim, generator=generator).to(dtype) for dim in (key_dim, value_dim))
    restored = round_trip(codec, keys, values)
    limit = 1.5 if isinstance(codec, KIVI) and codec.bits == 1 else 0.5
    for before, after in zip((keys, values), restored[:2], strict=True):
        assert after.dtype == torch.bfloat16
        assert after.shape == before.shape
        assert (before.float() - after.float()).square().sum() <= limit * before.float().square().sum()


@pytest.mark.parametrize("codec", CALIBRATION_FREE, ids=str)
@pytest.mark.parametrize("number", [0.0, 1.5, -3e38, 2.0**-130])
def test_constant_vectors(codec: Codec, number: float) -> None:
    keys = torch.full((1, 40, 6), number)
    restored = round_trip(codec, keys, keys)[0].float()
    assert torch.isfinite(restored).all()
    error = (restored.double() - keys).norm() / max(40 * 6 * number**2, 1e-300) ** 0.5
    assert error <= (0.7 if codec.name == "turbo" else 0.02)


@pytest.mark.parametrize("codec", CALIBRATION_FREE, ids=str)
def test_both_ends_of_the_range_in_one_vector(codec: Codec) -> None:
    keys = torch.tensor([3e38, -3e38, 1e-40, 0.0]).repeat(1, 40, 1)
    keys, values = round_trip(codec, keys, keys)[:2]
    assert torch.isfinite(keys).all()
    assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("kivi", "kivi:2"),
        ("kivi:4,group=32,residual=0", "kivi:4,residual=0"),
        ("turbo:2.50", "turbo:2.5"),
        ("turbo:3.0", "turbo:3"),
        ("fp8,format=e4m3", "fp8"),
        ("fp8,format=e5m2", "fp8,format=e5m2"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert codec_text(parse_codec(text)) == canonical
    assert parse_codec(canonical) == parse_codec(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kivi:9", "kivi:1 to kivi:8"),
        ("kivi:2.5", "type int"),
        ("kivi:2,group=1", "at least 2"),
        ("kivi,residual=-1", "at least 0"),
        ("turbo:0.5", "turbo:1 to turbo:8"),
        ("turbo:2.25", "steps of 0.5"),
        ("turbo:nan", "turbo:1 to turbo:8"),
        ("fp8,format=e3m4", "choose from e4m3, e5m2"),
        ("fp8:8", "no argument"),
    ],
)
def test_mistakes_are_named(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_codec(text)


@pytest.mark.parametrize("codec", CALIBRATION_FREE, ids=str)
def test_wrong_sizes_and_broken_numbers_are_refused(codec: Codec) -> None:
    positions = torch.arange(9)[None]
    keys = torch.ones(1, 9, 5)
    payload = codec.encode(7, keys, keys, positions, LAYOUT)
    for wrong in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(CorruptError, match="layer 7"):
            codec.decode(7, wrong, (1, 9, 5), (1, 9, 5), positions, LAYOUT)
    keys[0, 0, 0] = math.nan
    with pytest.raises(InputError, match="the keys of layer 7"):
        codec.encode(7, keys, keys, positions, LAYOUT)
