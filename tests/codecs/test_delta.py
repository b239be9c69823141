"""Differences from an anchor: bounds of the error, thirds of the layers, and what it costs against no differences."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvferry.codecs import Delta, codec_text, parse_codec
from kvferry.errors import CorruptError, RecipeError
from kvferry.recipe import Recipe, compress, decompress
from tests import helpers
from tests.codecs.test_codecs import LAYOUT, round_trip, tensors


@given(tensors(), st.sampled_from([0, 2, 3, 10]))
def test_every_number_is_within_half_a_step(pair: tuple[torch.Tensor, torch.Tensor], group: int) -> None:
    decoded = round_trip(Delta(group, deep=0.25), *pair)[:2]
    for before, after in zip(pair, decoded, strict=True):
        if not before.numel():
            continue
        exact = before.double()
        unit = max(float(exact.var(1, correction=0).mean().sqrt()), float(exact.abs().max()) * 2.0**-15)
        anchor = exact.abs().amax(-1, keepdim=True) / 254 * 1.01
        bound = torch.full_like(exact, unit * 0.25 / 2)
        if group:
            bound[:, ::group] = anchor.expand_as(exact)[:, ::group]
        assert ((after.double() - exact).abs() <= 1.01 * bound + 2.0**-8 * exact.abs() + 1e-38).all()


def test_deeper_thirds_take_coarser_steps() -> None:
    tensor = torch.randn(2, 100, 16)
    codec = Delta(group=0).for_layers(6)
    errors = []
    for layer in range(6):
        payload = codec.encode(layer, tensor, tensor, torch.arange(100).expand(2, -1), LAYOUT)
        keys, _ = codec.decode(layer, payload, (2, 100, 16), (2, 100, 16), torch.arange(100).expand(2, -1), LAYOUT)
        errors.append(float((keys.float() - tensor).square().mean()))
    assert errors[0] == errors[1] < errors[2] == errors[3] < errors[4] == errors[5]


def test_the_cache_says_how_many_layers_there_are() -> None:
    cache = helpers.cache(layers=3, dim=32)
    whole = decompress(compress(cache, "full|delta:0"))
    errors = [
        float((a.keys.float() - b.keys.float()).square().mean())
        for a, b in zip(whole.layers, cache.layers, strict=True)
    ]
    assert errors[0] < 0.5 * errors[1] < 0.5 * errors[2]
    assert all(
        torch.equal(a.keys, b.keys)
        for a, b in zip(Recipe.parse("full|delta:0").apply(cache), whole.layers, strict=True)
    )


def test_differences_pay_only_where_tokens_of_a_group_are_alike() -> None:
    alike = torch.randn(2, 20, 16).repeat_interleave(10, 1) * 4 + 0.5 * torch.randn(2, 200, 16)
    apart = torch.randn(2, 200, 16)
    sizes = {
        (name, group): len(round_trip(Delta(group), tensor, tensor)[2])
        for name, tensor in (("alike", alike), ("apart", apart))
        for group in (0, 10)
    }
    assert sizes["alike", 10] < sizes["alike", 0]
    assert sizes["apart", 10] > sizes["apart", 0]


@pytest.mark.parametrize("group", [0, 10])
def test_tokens_all_alike_and_single_tokens_survive(group: int) -> None:
    for tensor in (torch.full((2, 25, 5), -3.7e20), torch.zeros(1, 7, 3), torch.tensor([[[1e30, -2.0, 0.0]]])):
        keys, _, _ = round_trip(Delta(group), tensor, tensor)
        assert ((keys.float() - tensor).abs() <= 0.01 * tensor.abs().max()).all()


@given(st.binary(max_size=100), st.sampled_from([0, 10]))
def test_any_bytes_give_finite_numbers_or_are_corrupt(payload: bytes, group: int) -> None:
    positions = torch.arange(12).expand(2, -1)
    try:
        keys, values = Delta(group).decode(3, payload, (2, 12, 5), (2, 12, 4), positions, LAYOUT)
    except CorruptError:
        return
    assert keys.isfinite().all()
    assert values.shape == (2, 12, 4)


def test_text() -> None:
    assert codec_text(parse_codec("delta:0,deep=2")) == "delta:0,deep=2"
    for wrong in ("delta:1", "delta,deep=0", "delta,layers=-1", "delta,shallow=nan"):
        with pytest.raises(RecipeError):
            parse_codec(wrong)
