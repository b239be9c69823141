"""Rotating keys and turning them back."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.errors import InputError
from kvferry.models import prefill_inputs
from kvferry.models.rotary import rotary_of
from kvferry.rope import Rotary
from tests.models.families import FAMILIES, ROTATIONS, build


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rotary, torch.Tensor, torch.Tensor]:
    pairs = draw(st.integers(1, 12)) * 3
    heads, n, rest = draw(st.integers(1, 3)), draw(st.integers(0, 9)), 2 * draw(st.integers(0, 4))
    kind = draw(st.sampled_from(["plain", "neighbours", "rows", "turns"]))
    sections = () if kind in ("plain", "neighbours") else (pairs // 3,) * 3
    scaling = draw(st.floats(0.5, 2.0))
    rotary = Rotary(10000.0 ** (-torch.arange(pairs) / pairs), scaling, sections, kind == "turns", kind == "neighbours")
    torch.manual_seed(draw(st.integers(0, 99)))
    per_head = (heads,) if draw(st.booleans()) else ()
    axes = draw(st.sampled_from([1, 3])) if sections else 1
    positions = torch.randint(0, 30_000, (axes, *per_head, n))
    return rotary, torch.randn(heads, n, 2 * pairs + rest), positions


@settings(max_examples=60, deadline=None)
@given(cases())
def test_unrotate_undoes_rotate(case: tuple[Rotary, torch.Tensor, torch.Tensor]) -> None:
    rotary, keys, positions = case
    turned = rotary.rotate(keys, positions)
    torch.testing.assert_close(rotary.unrotate(turned, positions), keys, atol=1e-5, rtol=1e-5)
    pairs = len(rotary.inv_freq)
    torch.testing.assert_close(turned[..., 2 * pairs :], keys[..., 2 * pairs :])
    length = keys[..., : 2 * pairs].norm(dim=-1) * rotary.scaling
    torch.testing.assert_close(turned[..., : 2 * pairs].norm(dim=-1), length, atol=1e-4, rtol=1e-4)


def test_position_zero_turns_nothing() -> None:
    keys = torch.randn(2, 3, 8)
    torch.testing.assert_close(Rotary(torch.ones(4)).rotate(keys, torch.zeros(1, 3)), keys)


def test_axes_in_rows_and_in_turns() -> None:
    rows = Rotary(torch.ones(6), sections=(3, 2, 1))
    turns = Rotary(torch.ones(6), sections=(2, 2, 2), interleaved=True)
    assert rows.axis_of_pair().tolist() == [0, 0, 0, 1, 1, 2]
    assert turns.axis_of_pair().tolist() == [0, 1, 2, 0, 1, 2]


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(InputError, match="do not fit keys"):
        Rotary(torch.ones(4)).rotate(torch.randn(1, 3, 8), torch.zeros(1, 2))
    with pytest.raises(InputError, match="do not fit keys"):
        Rotary(torch.ones(8)).rotate(torch.randn(1, 3, 8), torch.zeros(1, 3))
    with pytest.raises(InputError, match="sum to 4"):
        Rotary(torch.ones(4), sections=(1, 1, 1))
    with pytest.raises(InputError, match="1 or 3 axes"):
        Rotary(torch.ones(3), sections=(1, 1, 1)).rotate(torch.randn(1, 3, 8), torch.zeros(2, 3))


def test_neighbours_are_turned_together() -> None:
    keys = torch.tensor([[[1.0, 0.0, 0.0, 1.0, 5.0]]])
    turned = Rotary(torch.tensor([torch.pi / 2, torch.pi]), neighbours=True).rotate(keys, torch.ones(1, 1))
    torch.testing.assert_close(turned, torch.tensor([[[0.0, 1.0, 0.0, -1.0, 5.0]]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", *ROTATIONS])
def test_a_prefill_turns_keys_as_it_is_said(name: str) -> None:
    """What leaves the key projection (and its norm), turned by :func:`rotary_of`, is what the cache holds."""
    model, inputs = build(name)
    caught: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.get_decoder().layers):
        attention = layer.self_attn
        module = getattr(attention, "k_norm", None) or attention.k_proj

        def keep(_: object, __: object, output: torch.Tensor, index: int = index) -> None:
            caught[index] = output.detach()

        module.register_forward_hook(keep)
    cache = prefill_inputs(model, inputs).cache
    for index, (layer, rotary) in enumerate(zip(cache, rotary_of(model), strict=True)):
        assert rotary is not None
        heads, n, dim = layer.keys.shape
        found = caught[index][0]
        plain = found if found.ndim == 3 else found.view(-1, heads, dim).transpose(0, 1)
        turned = rotary.rotate(plain[:, :n], torch.arange(n)[None])
        torch.testing.assert_close(turned, layer.keys, atol=1e-5, rtol=1e-5)
    untouched = {"cohere2": {1}, "smollm3": {1}, "exaone4": {1}}.get(name, set())
    assert {i for i, x in enumerate(rotary_of(model)) if x is not None and not len(x.inv_freq)} == untouched


def test_a_rotation_that_the_code_does_not_show_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build("llama")
    module = sys.modules[type(model.get_decoder().rotary_emb).__module__]
    monkeypatch.setattr(module, "rotate_half", lambda x: x.flip(-1))
    assert rotary_of(model) == (None, None, None)
    monkeypatch.delattr(module, "rotate_half")
    assert rotary_of(model) == (None, None, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_rotate_alike(name: str) -> None:
    """A key that the model itself rotated at one position, moved to another, is what it rotates there."""
    model, inputs = build(name)
    decoder = model.get_decoder()
    n = inputs["input_ids"].shape[1]
    for layer, rotary in enumerate(rotary_of(model)):
        assert rotary is not None
        axes = 3 if rotary.sections else 1
        torch.manual_seed(layer)
        positions = torch.randint(0, 500, (axes, n))
        given = positions if axes == 1 else positions[:, None]
        kinds = getattr(model.config.get_text_config(), "layer_types", None)
        by_kind = hasattr(decoder.rotary_emb, "layer_types")
        cos, sin = decoder.rotary_emb(torch.zeros(1), given, *([kinds[layer]] if by_kind else []))
        if cos.shape[-1] == len(rotary.inv_freq):  # gpt-oss gives each pair's angle once
            cos, sin = cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)
        keys = torch.randn(1, n, cos.shape[-1])
        half = torch.cat([-keys[..., cos.shape[-1] // 2 :], keys[..., : cos.shape[-1] // 2]], dim=-1)
        torch.testing.assert_close(rotary.rotate(keys, positions), keys * cos + half * sin, atol=1e-4, rtol=1e-4)
