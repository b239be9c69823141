"""The beginning of a stream, and some of its layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvferry.bitstream import Reader, decompress_layers, inspect
from kvferry.bitstream.records import Kind, parse
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import BF16, CODECS
from kvferry.codecs.base import Shape
from kvferry.errors import CorruptError, InputError, TruncatedError
from kvferry.recipe import compress, compress_frames, decompress
from kvferry.selection import Order
from kvferry.wire import bitstream_pb2 as pb
from tests.bitstream.fuzz import closed, opened
from tests.bitstream.test_stream import same
from tests.helpers import cache

RECIPES = [
    "full|bf16", "knorm@0.4|int4|zstd", "knorm@0.4,budget=head|int3", "random@0.5|int1", "none|int8",
    "knorm@0.3,merge=lookm|int8|zstd",
]  # fmt: skip
ORDERS = st.sampled_from(["importance", "layer", "token"])


@functools.cache
def whole_of(recipe: str) -> KVCache:
    return decompress(compress(cache(), recipe))


@settings(max_examples=40)
@given(st.sampled_from(RECIPES), st.integers(2, 7), ORDERS)
def test_a_whole_stream_decodes_to_the_same_whatever_its_tiers(recipe: str, tiers: int, order: Order) -> None:
    assert same(decompress(compress(cache(), recipe, tiers, order)), whole_of(recipe))


@settings(max_examples=25)
@given(st.sampled_from(RECIPES), st.integers(2, 5))
def test_any_frame_may_be_the_last_to_arrive(recipe: str, tiers: int) -> None:
    header, *frames, _ = compress_frames(cache(), recipe, tiers)
    whole = whole_of(recipe)
    reader, shares, size = Reader(), [], len(header)
    reader.feed(header)
    for number, frame in enumerate(frames):
        reader.feed(frame)
        reader.feed(b"")
        size += len(frame)
        if number < 2:
            with pytest.raises(TruncatedError, match=f"layers {'1 to 2' if number == 0 else '2'} has come"):
                reader.partial()
            continue
        part, share, read = reader.partial()
        assert read == size
        assert is_part(part, whole)
        shares.append(share)
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
    assert shares[0] < 0.6
    assert same(reader.partial().cache, whole)


def is_part(part: KVCache, whole: KVCache) -> bool:
    """Every token of ``part`` is in ``whole``, with the same numbers."""
    for some, all_ in zip(part, whole, strict=True):
        for few, many in zip(some.split(), all_.split(), strict=True):
            at = torch.searchsorted(many.positions[0], few.positions[0])
            if not same_tokens(few, many.take(at[None])):
                return False
    return True


def same_tokens(one: LayerCache, other: LayerCache) -> bool:
    return all(torch.equal(getattr(one, x), getattr(other, x)) for x in ("keys", "values", "positions"))


def test_what_is_cut_within_a_frame_counts_for_nothing() -> None:
    header, *frames, _ = compress_frames(cache(), "knorm@0.4|int4", 2)
    reader = Reader()
    with pytest.raises(TruncatedError, match="no header yet"):
        reader.partial()
    reader.feed(header + b"".join(frames[:3]) + frames[3][:-1])
    part = reader.partial()
    assert part.bytes == len(header) + sum(map(len, frames[:3]))
    assert part.share == pytest.approx(0.5, abs=0.1)
    with pytest.raises(TruncatedError, match="before its trailer"):
        reader.cache()


def test_without_tiers_the_last_layer_makes_it_whole() -> None:
    header, *frames, _ = compress_frames(cache(), "full|int8")
    reader = Reader()
    reader.feed(header + b"".join(frames))
    assert reader.partial().share == 1.0
    assert not reader.complete


def test_a_broken_stream_has_no_beginning() -> None:
    header, *frames, _ = compress_frames(cache(), "full|int8", 2)
    reader = Reader()
    with pytest.raises(CorruptError):
        reader.feed(header + b"".join(frames[:4]) + bytes(30))
    with pytest.raises(CorruptError):
        reader.partial()


def test_bytes_hold_in_tiers_too() -> None:
    recipe = "knorm,bytes=1200|int8"
    one, four = compress(cache(), recipe), compress(cache(), recipe, 4)
    assert max(len(one), len(four)) <= 1200
    assert sum(frame.entries for frame in inspect(four).frames) < sum(frame.entries for frame in inspect(one).frames)


@dataclass
class Remembering:
    """BF16 whose payloads are masked by the number of frames and of bytes before."""

    coder: BF16 = field(default_factory=BF16)
    name: ClassVar[str] = "remembering"
    before: int = 0

    def encoder(self, fingerprint: str) -> Remembering:
        return Remembering()

    decoder = encoder

    def mask(self, payload: bytes) -> bytes:
        key = self.before % 251
        self.before += 1 + len(payload)
        return bytes(octet ^ key for octet in payload)

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        return self.mask(self.coder.encode(layer, keys, values, positions, layout))

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.coder.decode(layer, self.mask(payload), key_shape, value_shape, positions, layout)


def test_codecs_that_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "remembering", Remembering())
    plain = replace(decompress(compress(cache(), "knorm@0.4|bf16")), recipe="knorm@0.4|remembering")
    blob = compress(cache(), "knorm@0.4|remembering", 3)
    assert same(decompress(blob), plain)
    header, *frames, _ = compress_frames(cache(), "knorm@0.4|remembering", 3)
    reader = Reader()
    reader.feed(header + b"".join(frames[:5]))
    assert is_part(reader.partial().cache, plain)
    assert same_tokens(decompress_layers(blob, [2])[2], plain.layers[2])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tiers", [1, 3])
def test_some_layers(recipe: str, tiers: int) -> None:
    blob = compress(cache(), recipe, tiers)
    whole = decompress(blob)
    for wanted in ([1], [0, 2], [2, 1], []):
        some = decompress_layers(blob, wanted)
        assert some.keys() == set(wanted)
        assert all(same_tokens(some[layer], whole.layers[layer]) for layer in wanted)


def test_payloads_of_other_layers_are_not_decoded() -> None:
    header, (kind, first), *rest = opened(compress(cache(), "knorm@0.4|int4|zstd", 2))
    frame = parse(pb.Frame, first)
    frame.payload, frame.stored = b"neither zstd nor int4", False
    blob = closed([header, (kind, frame.SerializeToString()), *rest])
    assert kind == Kind.FRAME
    with pytest.raises(CorruptError, match="decompress"):
        decompress(blob)
    assert decompress_layers(blob, [1, 2]).keys() == {1, 2}
    with pytest.raises(CorruptError, match="decompress"):
        decompress_layers(blob, [0])


def test_layers_that_are_not_there() -> None:
    blob = compress(cache(), "full|int8")
    with pytest.raises(InputError, match="layers 0 to 2, none numbered 3 to 5, 9"):
        decompress_layers(blob, [9, 4, 1, 3, 5])
    with pytest.raises(TruncatedError):
        decompress_layers(blob[:-1], [1])
    reader = Reader(layers=[1])
    reader.feed(blob)
    with pytest.raises(InputError, match="single layers"):
        reader.cache()
