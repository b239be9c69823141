"""vLLM's paged caches and the shelves, by tensors of the shapes that vLLM 0.33 has. Needs no vLLM."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvferry.cache import LayerCache
from kvferry.codecs import BF16, Integer, parse_codec
from kvferry.errors import (
    BitstreamError,
    CorruptError,
    DependencyError,
    FingerprintError,
    InputError,
    RecipeError,
    UnsupportedModelError,
)
from kvferry.integrations.vllm import CacheShelf, EmbedsShelf, paged
from kvferry.models import VisualEmbeds
from kvferry.recipe import compress, decompress
from tests.helpers import cache

BLOCKS, HEADS, SIZE, DIM = 9, 2, 4, 8
SCATTERED = [7, 2, 5, 0, 8, 3, 1, 6]


def page_of(order: str = "NHD") -> torch.Tensor:
    """A page of NaN, so that what was not written shows; both orders in memory look alike to whoever indexes."""
    if order == "HND":
        return torch.full((BLOCKS, HEADS, SIZE, 2 * DIM), torch.nan, dtype=torch.bfloat16)
    return torch.full((BLOCKS, SIZE, HEADS, 2 * DIM), torch.nan, dtype=torch.bfloat16).transpose(1, 2)


def whole() -> LayerCache:
    return cache(layers=1, heads=HEADS, dim=DIM).layers[0]


@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_every_token_lies_in_its_slot(order: str) -> None:
    layer, page = whole(), page_of(order)
    paged.write(page, layer, SCATTERED, 0, 30)  # the eighth block is filled half
    for token in range(30):
        slot = page[SCATTERED[token // SIZE], :, token % SIZE]
        assert torch.equal(slot[:, :DIM], layer.keys[:, token])
        assert torch.equal(slot[:, DIM:], layer.values[:, token])
    assert page[6, :, 2:].isnan().all()
    assert page[4].isnan().all()


@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_a_later_part_leaves_the_first_alone(order: str) -> None:
    layer, page = whole(), page_of(order)
    paged.write(page, layer, SCATTERED, 8, 13)
    written = {(SCATTERED[t // SIZE], t % SIZE) for t in range(8, 13)}
    for block in range(BLOCKS):
        for offset in range(SIZE):
            assert bool(page[block, :, offset].isnan().any()) is ((block, offset) not in written)
    assert torch.equal(page[5, 1, 2, DIM:], layer.values[1, 10])


@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_what_was_written_is_read(order: str) -> None:
    layer, page = whole(), page_of(order)
    paged.write(page, layer, SCATTERED, 0, 31)
    back = paged.read(page, SCATTERED, 31)
    assert torch.equal(back.keys, layer.keys[:, :31])
    assert torch.equal(back.values, layer.values[:, :31])
    assert back.positions.tolist() == [list(range(31))] * HEADS
    page.zero_()
    assert torch.equal(back.keys, layer.keys[:, :31])


def test_what_does_not_fit_is_refused() -> None:
    layer, page = whole(), page_of()
    with pytest.raises(InputError, match="7 blocks of 4 do not hold 30"):
        paged.write(page, layer, SCATTERED[:7], 0, 30)
    with pytest.raises(InputError, match="blocks 0 to 9"):
        paged.write(page, layer, [0, 9], 0, 8)
    with pytest.raises(InputError, match="tokens 0 to 32 of a cache of 31"):
        paged.write(page, layer, SCATTERED, 0, 32)
    assert page.isnan().all()


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM, dtype=torch.float16), "float16"),
        (torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM, dtype=torch.float8_e4m3fn), "float8"),
        (torch.zeros(BLOCKS, SIZE, 576, dtype=torch.bfloat16), "MLA"),
        (torch.zeros(2, BLOCKS, SIZE, HEADS, DIM, dtype=torch.bfloat16), "another vLLM"),
        (torch.zeros(BLOCKS, HEADS, 2 * SIZE, DIM, dtype=torch.bfloat16), "a backend that packs it otherwise"),
    ],
)
def test_other_pages_are_refused_by_name(page: torch.Tensor, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as refused:
        paged.check_page(page, SIZE, "model.layers.3.self_attn.attn")
    assert "model.layers.3.self_attn.attn" in str(refused.value)


@pytest.mark.parametrize(("heads", "dim"), [(1, DIM), (HEADS, 16)])
def test_another_model_s_heads_are_refused(heads: int, dim: int) -> None:
    layer = cache(layers=1, heads=heads, dim=dim).layers[0]
    with pytest.raises(InputError, match=r"layers\.0 has 2 heads of 8 channels"):
        paged.check_layer(page_of(), layer, "layers.0")
    paged.check_page(page_of(), SIZE, "layers.0")
    paged.check_layer(page_of(), whole(), "layers.0")


@pytest.mark.parametrize("recipe", ["full|bf16", "full|int8|zstd", "full|int4"])
def test_a_prompt_is_found_by_its_tokens_and_pictures(tmp_path: Path, recipe: str) -> None:
    made = cache()
    ids = made.layout.token_ids.tolist()
    shelf = CacheShelf(tmp_path / "new", made.fingerprint)
    stream = compress(made, recipe)
    shelf.put(stream, ["a"])
    assert shelf.length(ids, ["a"]) == made.length == 31
    assert shelf.length(ids) == shelf.length(ids, ["b"]) == shelf.length(ids[:-1], ["a"]) == 0
    assert CacheShelf(shelf.folder, "cd" * 32).length(ids, ["a"]) == 0
    got, wanted = shelf.get(ids, ["a"]), decompress(stream)
    assert all(
        torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in zip(got, wanted, strict=True)
    )
    with pytest.raises(FileNotFoundError):
        shelf.get(ids)


def test_evicted_tokens_are_refused_both_ways(tmp_path: Path) -> None:
    made = cache()
    shelf = CacheShelf(tmp_path, made.fingerprint)
    ids = made.layout.token_ids.tolist()
    for recipe in ("knorm@0.5|int8", "none|bf16", "knorm@0.5,budget=head|int8"):
        pruned = compress(made, recipe)
        with pytest.raises(UnsupportedModelError, match=r"lacks tokens.*full\|int4"):
            shelf.put(pruned)
        assert not list(tmp_path.iterdir())
    shelf.path(ids).write_bytes(pruned)
    with pytest.raises(UnsupportedModelError, match="lacks tokens"):
        shelf.length(ids)
    with pytest.raises(UnsupportedModelError, match="lacks tokens"):
        shelf.get(ids)


def test_a_whole_recipe_s_name_over_missing_tokens_does_not_help(tmp_path: Path) -> None:
    """The tokens themselves are counted, not what the recipe says."""
    made = cache()
    some = torch.arange(20).expand(2, -1)
    liar = replace(made, layers=tuple(x.take(some) for x in made))
    with pytest.raises(UnsupportedModelError, match="lacks tokens"):
        CacheShelf(tmp_path, made.fingerprint).put(compress(liar, "full|bf16"))


def test_a_file_of_another_model_or_prompt_is_refused(tmp_path: Path) -> None:
    made = cache()
    ids = made.layout.token_ids.tolist()
    shelf = CacheShelf(tmp_path, "cd" * 32)
    with pytest.raises(FingerprintError, match=r"abababababab.*cdcdcdcdcdcd"):
        shelf.put(compress(made, "full|bf16"))
    shelf.path(ids).write_bytes(compress(made, "full|bf16"))
    with pytest.raises(FingerprintError, match=shelf.path(ids).name):
        shelf.length(ids)
    mine = CacheShelf(tmp_path, made.fingerprint)
    mine.path([1, 2, 3]).write_bytes(compress(made, "full|bf16"))
    with pytest.raises(CorruptError, match="another prompt"):
        mine.length([1, 2, 3])


def test_broken_files_are_refused(tmp_path: Path) -> None:
    made = cache()
    ids = made.layout.token_ids.tolist()
    shelf = CacheShelf(tmp_path, made.fingerprint)
    stream = compress(made, "full|int8")
    path = shelf.put(stream)
    for at in range(0, len(stream), 97):
        path.write_bytes(stream[:at] + bytes([stream[at] ^ 1]) + stream[at + 1 :])
        with pytest.raises(BitstreamError):
            shelf.length(ids)
        path.write_bytes(stream[:at])
        with pytest.raises(BitstreamError):
            shelf.get(ids)


def picture(tokens: int = 6, hidden: int = 16) -> VisualEmbeds:
    made = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    return VisualEmbeds(made, (1, 4, tokens))  # in patches, two by two to a token


@pytest.mark.parametrize(("codec", "most"), [(BF16(), 0.0), (Integer(bits=8), 0.02), (Integer(bits=4), 0.35)])
def test_embeddings_come_back(tmp_path: Path, codec: BF16 | Integer, most: float) -> None:
    shelf = EmbedsShelf(tmp_path / "new", "ef" * 32, hidden=16, merge_size=2)
    seen = picture()
    path = shelf.put("one", seen, codec)
    back = shelf.get("one")
    assert back is not None
    assert back.grid == seen.grid
    assert back.embeds.dtype == torch.bfloat16
    assert float((back.embeds.float() - seen.embeds.float()).abs().max()) <= most
    assert shelf.get("two") is None
    assert "one" not in path.name


def test_wrong_embeddings_are_refused(tmp_path: Path) -> None:
    shelf = EmbedsShelf(tmp_path, "ef" * 32, hidden=16, merge_size=2)
    path = shelf.put("one", picture(), Integer(bits=8))
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BitstreamError):
            shelf.get("one")
        path.write_bytes(data[:at])
        with pytest.raises(BitstreamError):
            shelf.get("one")
    other = EmbedsShelf(tmp_path, "aa" * 32, hidden=16, merge_size=2)
    other.path("one").write_bytes(data)
    with pytest.raises(FingerprintError, match=r"efefefefefef.*aaaaaaaaaaaa"):
        other.get("one")
    with pytest.raises(InputError, match="shape"):
        shelf.put("two", picture(hidden=8), BF16())
    with pytest.raises(RecipeError, match="bf16 or int1 to int8"):
        shelf.put("two", picture(), parse_codec("fp8"))  # type: ignore[arg-type]


def test_without_vllm_the_connectors_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvferry.integrations.vllm as package

    with pytest.raises(AttributeError, match="nosuch"):
        _ = package.nosuch
    for module in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    for name, home in (("KVFerryConnector", "kv_connector"), ("KVFerryECConnector", "ec_connector")):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{home}", raising=False)
        with pytest.raises(DependencyError, match=r"kvferry\[vllm\]"):
            getattr(package, name)
