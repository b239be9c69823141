"""Text and visual tokens, keys and values, each as if alone."""

from collections.abc import Sequence

import pytest
import torch

from kvferry.codecs import Apart, codec_text, parse_codec
from kvferry.errors import CorruptError, InputError, RecipeError
from kvferry.recipe import compress, decompress
from tests.helpers import cache, layout

PROMPT = layout()
FULL = cache(PROMPT, layers=1, dim=6)


@pytest.mark.parametrize(("text", "visual"), [("int8", "int2/int4"), ("bf16", "kivi:2/fp8"), ("turbo:4/int8", "int1")])
def test_each_quarter_is_what_its_codec_makes_of_it(text: str, visual: str) -> None:
    (layer,) = FULL
    (mixed,) = decompress(compress(FULL, f"full|apart,text={text},visual={visual}"))
    where = torch.from_numpy(PROMPT.visual)[layer.positions[0]]
    for mask, codecs in ((~where, text.split("/")), (where, visual.split("/"))):
        shape = (2, int(mask.sum()), 6)
        args = layer.keys[:, mask], layer.values[:, mask], layer.positions[:, mask], PROMPT
        for side, name in ((0, codecs[0]), (1, codecs[-1])):
            codec = parse_codec(name)
            alone = codec.decode(0, codec.encode(0, *args), shape, shape, *args[2:])
            assert torch.equal((mixed.keys, mixed.values)[side][:, mask], alone[side])


def test_bytes_are_those_of_the_parts() -> None:
    (layer,) = FULL
    visual = int(PROMPT.visual[layer.positions[0]].sum())
    text = layer.kept - visual
    codec = parse_codec("apart,text=bf16,visual=int2/int4")
    payload = codec.encode(0, layer.keys, layer.values, layer.positions, PROMPT)
    assert len(payload) == 2 * (text * 6 * 4) + 2 * visual * 2 * 2 + 2 * visual * 6 * 2 // 8 + 2 * visual * 6 * 4 // 8
    for wrong in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(CorruptError, match="layer 0"):
            codec.decode(0, wrong, (2, layer.kept, 6), (2, layer.kept, 6), layer.positions, PROMPT)


@pytest.mark.parametrize("selection", ["knorm@0.4", "knorm@0.5,budget=head", "none", "random@0.1"])
@pytest.mark.parametrize("codec", ["apart", "apart,text=kivi:2,visual=turbo:2.5", "apart,visual=int3"])
def test_any_selection_survives(selection: str, codec: str) -> None:
    plain = decompress(compress(FULL, f"{selection}|bf16")).layers[0]
    other = decompress(compress(FULL, f"{selection}|{codec}|zstd")).layers[0]
    assert torch.equal(plain.positions, other.positions)
    assert plain.counts == other.counts
    error = (plain.keys.float() - other.keys.float()).square().sum() / plain.keys.float().square().sum()
    assert error < 0.15


def test_heads_that_keep_different_modalities() -> None:
    """Head 0 keeps text only, head 1 a picture only: the masks have no shape in common."""
    keys = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    codec = Apart("bf16", "int1")
    payload = codec.encode(0, keys, keys, positions, PROMPT)
    restored, _ = codec.decode(0, payload, (2, 3, 4), (2, 3, 4), positions, PROMPT)
    assert torch.equal(restored[0], keys[0].bfloat16())
    assert len(restored[1].abs().unique()) == 3


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("apart", "apart"),
        ("apart,visual=int4,text=int8", "apart"),
        ("apart,visual=int2/int2", "apart,visual=int2"),
        ("apart,visual= int2 / kivi ,text=turbo:2.50", "apart,text=turbo:2.5,visual=int2/kivi:2"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert codec_text(parse_codec(text)) == canonical
    assert parse_codec(canonical) == parse_codec(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("text=int9", "did you mean"),
        ("visual=int2/", "there is no codec ''"),
        ("visual=apart", "there is no codec 'apart'"),
        ("visual=int2/int4/int8", "there is no codec"),
        ("visual=kivi:0", "kivi:1 to kivi:8"),
        ("keys=int2", "choose from text, visual"),
    ],
)
def test_mistakes_are_named(options: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_codec(f"apart,{options}")


@pytest.mark.parametrize("where", [[0, 0], [0, 10]])
def test_broken_numbers_are_refused_by_name(where: Sequence[int]) -> None:
    (layer,) = FULL
    values = layer.values.clone()
    values[tuple(where)] = torch.inf
    with pytest.raises(InputError, match="the values of layer 4"):
        Apart().encode(4, layer.keys, values, layer.positions, PROMPT)
