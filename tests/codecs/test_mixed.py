"""Widths by layer, part and modality: what travels, what a profile must be, and bytes that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from kvferry.cache import KVCache, PromptLayout
from kvferry.codecs import BF16, Codec, Integer, Mixed, codec_text, parse_codec
from kvferry.codecs.mixed import PARTS, WIDTHS, ByPart, Widths, part_size, read_bits
from kvferry.errors import CorruptError, FingerprintError, InputError, RecipeError
from kvferry.recipe import Recipe, compress, decompress
from tests.helpers import cache

MODEL = "ab" * 32
widths = st.sampled_from(WIDTHS)
layers = st.tuples(widths, widths, widths, widths)


def prompt(n: int, seed: int) -> PromptLayout:
    """``n`` tokens, any of which may be visual."""
    modality = np.random.default_rng(seed).integers(0, 3, n).astype(np.uint8)
    return PromptLayout(np.zeros(n, np.int32), modality, np.zeros(n, np.uint8), np.arange(n, dtype=np.int32)[None])


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, PromptLayout]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Keys and values whose heads keep different tokens, and none at all at times; one long head too."""
    heads, kept, seed = draw(st.integers(1, 3)), draw(st.integers(0, 9)), draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(heads, kept, draw(st.integers(1, 11)), generator=generator) for _ in range(2))
    if draw(st.booleans()):
        counts = [draw(st.integers(0, 12)) for _ in range(2)]
        keys, values = (torch.randn(1, sum(counts), x.shape[2], generator=generator) for x in (keys, values))
        rows = [torch.cat([torch.randperm(12, generator=generator)[:n].sort()[0] for n in counts])]
    else:
        rows = [torch.randperm(12, generator=generator)[:kept].sort()[0] for _ in range(heads)]
    return keys, values, torch.stack(rows), prompt(12, seed)


def shape(tensor: torch.Tensor) -> tuple[int, int, int]:
    rows, kept, dim = tensor.shape
    return rows, kept, dim


@given(cases(), layers)
def test_every_part_is_what_its_own_codec_makes_of_it(case: Case, bits: Widths) -> None:
    keys, values, positions, layout = case
    payload = ByPart((bits,)).encode(0, keys, values, positions, layout)
    back = Mixed("absent.json").decode(0, payload, shape(keys), shape(values), positions, layout)
    visual = torch.from_numpy(layout.visual)[positions]
    size = 2
    for index, width in enumerate(bits):
        before, after = (pair[index // 2] for pair in ((keys, values), back))
        mask = ~visual if index % 2 else visual
        codec: Codec = BF16() if width == 16 else Integer(width)
        whole = codec.decode(
            0, codec.encode(0, before, before, positions, layout), shape(before), shape(before), positions, layout
        )
        assert after.dtype == torch.bfloat16
        assert torch.equal(after[mask], whole[0][mask])
        size += part_size(int(mask.sum()), before.shape[2], width)
    assert len(payload) == size


def test_the_payload_says_its_widths_first() -> None:
    keys = torch.tensor([[[1.0, -1.0], [7.0, 3.5]]])
    layout = PromptLayout(
        np.zeros(2, np.int32), np.array([1, 0], np.uint8), np.zeros(2, np.uint8), np.zeros((1, 2), int)
    )
    payload = ByPart(((16, 4, 2, 8),)).encode(0, keys, keys, torch.tensor([[0, 1]]), layout)
    one, peak = [0x3F, 0x80], [0x3D, 0x62]  # bfloat16 of 1, and of 7 / 127 rounded up
    visual_keys, text_keys = [0x3F, 0xBF, 0x80, 0x80], [*one, 15 | 12 << 4]
    visual_values, text_values = [*one, 3 | 1 << 2], [*peak, 255, 191]
    assert list(payload) == [0x40, 0x82, *visual_keys, *text_keys, *visual_values, *text_values]


@given(cases(), layers, st.data())
def test_hostile_bytes_are_corrupt(case: Case, bits: Widths, data: st.DataObject) -> None:
    keys, values, positions, layout = case
    payload = ByPart((bits,)).encode(0, keys, values, positions, layout)
    where = shape(keys), shape(values), positions, layout
    wrong = data.draw(st.sampled_from([payload[:-1], payload + b"\0", b"", b"\x44"]))
    with pytest.raises(CorruptError, match="layer 0"):
        Mixed().decode(0, wrong, *where)
    unknown = data.draw(st.integers(9, 15))
    with pytest.raises(CorruptError, match="do not exist"):
        Mixed().decode(0, bytes([4 | unknown << 4, 0x44]) + payload[2:], *where)
    noise = data.draw(st.binary(max_size=80))
    try:
        back = Mixed().decode(0, noise, *where)
    except CorruptError:
        return
    assert (shape(back[0]), shape(back[1])) == where[:2]


def test_not_finite_is_refused_by_name() -> None:
    keys, where = torch.ones(1, 3, 2), (torch.arange(3)[None], prompt(3, 0))
    for bad in (float("nan"), float("inf"), 3.4e38):
        broken = keys.clone()
        broken[0, 2, 1] = bad
        for bits in (16, 4):
            codec = ByPart(((bits,) * 4,))
            with pytest.raises(InputError, match="the values of layer 0"):
                codec.encode(0, keys, broken, *where)
            with pytest.raises(InputError, match="the keys of layer 0"):
                codec.encode(0, broken, keys, *where)


def write(path: Path, plan: list[Widths], **changed: Any) -> Path:
    columns = {part: [layer[index] for layer in plan] for index, part in enumerate(PARTS)}
    path.write_text(json.dumps({"fingerprint": MODEL, "bits": columns} | changed))
    return path


BITS: list[Widths] = [(4, 16, 2, 8), (16, 16, 16, 16), (1, 3, 5, 7)]


@pytest.mark.parametrize("selection", ["full", "none", "knorm@0.5", "knorm@0.3,budget=head"])
@pytest.mark.parametrize("stage", ["", "|zstd"])
def test_whoever_decodes_needs_no_profile(tmp_path: Path, selection: str, stage: str) -> None:
    recipe = f"{selection}|mixed@{write(tmp_path / 'p.json', BITS)}{stage}"
    here = Recipe.parse(recipe).apply(cache())
    blob = compress(cache(), recipe)
    (tmp_path / "p.json").unlink()
    there = decompress(blob)
    assert there.recipe == f"{selection}|mixed{stage}"
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    full = cache()
    kept = there.layers[1].positions[0]
    if not there.layers[1].counts:
        assert torch.equal(there.layers[1].keys[0], full.layers[1].keys[0, kept])


def test_without_pictures_and_with_one_token(tmp_path: Path) -> None:
    recipe = f"full|mixed@{write(tmp_path / 'p.json', BITS)}"
    words = prompt(5, 0)
    for layout in (PromptLayout(words.token_ids, words.role, words.role, words.positions), prompt(2, 1)):
        before = cache(layout)
        after = decompress(compress(before, recipe))
        assert torch.equal(after.layers[1].values, before.layers[1].values)


def refused(recipe: str, of: KVCache | None = None) -> str:
    with pytest.raises(InputError) as error:
        compress(of or cache(), recipe)
    return str(error.value)


def test_what_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    recipe = f"full|mixed@{path}"
    assert "kvferry diagnose MODEL" in refused("full|mixed")
    assert "is no profile" in refused(recipe)
    path.write_text('{"fingerprint"')
    assert "is no profile" in refused(recipe)
    path.write_bytes(b"\xff\xfe\x00")
    assert "is no profile" in refused(recipe)
    for text in ("[]", "7", "{}", json.dumps({"fingerprint": MODEL, "bits": dict.fromkeys(PARTS, 4)})):
        path.write_text(text)
        assert "is no profile" in refused(recipe)
    write(path, BITS, bits={part: [4] * (1 + index) for index, part in enumerate(PARTS)})
    assert "is no profile" in refused(recipe)
    for bad in (0, 9, -4, 4.0, "4", True, None, [4]):
        write(path, [(4, 4, 4, bad)])  # type: ignore[list-item]
        assert "1 to 8 or 16" in refused(recipe)
    write(path, [])
    assert "1 to 8 or 16" in refused(recipe)
    write(path, BITS[:2])
    assert "2 layers" in refused(recipe)


def test_a_profile_belongs_to_one_model(tmp_path: Path) -> None:
    path = str(write(tmp_path / "p.json", BITS))
    assert read_bits(path, MODEL) == tuple(BITS)
    with pytest.raises(FingerprintError, match="another model"):
        read_bits(path, "cd" * 32)
    with pytest.raises(InputError, match="cannot be checked"):
        read_bits(path, "")
    with pytest.raises(InputError, match="cannot be checked"):
        Mixed(path).encode(
            0, torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), prompt(1, 0)
        )


names = st.text("abcXYZ019._-/ =:@", min_size=1).filter(lambda x: x == x.strip())


@given(names)
def test_text(profile: str) -> None:
    assert parse_codec(codec_text(Mixed(profile))) == Mixed(profile)
    assert str(Recipe.parse(f"full | mixed@{profile} | zstd")) == f"full|mixed@{profile}|zstd"


def test_text_that_cannot_be() -> None:
    with pytest.raises(InputError, match="without , and"):
        Mixed("a,b.json")
    with pytest.raises(RecipeError, match="no argument"):
        parse_codec("mixed:4")


@given(st.integers(0, 20), st.integers(1, 9), widths)
def test_the_size_of_a_part(vectors: int, dim: int, bits: int) -> None:
    codec: Codec = BF16() if bits == 16 else Integer(bits)
    part = torch.ones(1, vectors, dim)
    where = torch.zeros(1, vectors, dtype=torch.int64), prompt(1, 0)
    assert len(codec.encode(0, part, part[:, :0], *where)) == part_size(vectors, dim, bits)
