"""Writer, Reader and inspect."""

from dataclasses import replace

import google_crc32c
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvferry.bitstream import Reader, Writer, inspect
from kvferry.bitstream.records import CHECKSUM, START, Kind
from kvferry.bitstream.varints import write_varint
from kvferry.cache import KVCache, LayerCache
from kvferry.codecs import Integer
from kvferry.errors import CorruptError, InputError, TruncatedError, VersionError
from kvferry.recipe import Recipe, compress, compress_frames, decompress
from kvferry.wire import bitstream_pb2 as pb
from tests.helpers import cache, layout

INT8 = "knorm@0.3|int8|zstd"


def same(one: KVCache, other: KVCache) -> bool:
    return len(one.layers) == len(other.layers) and all(
        torch.equal(getattr(a, part), getattr(b, part))
        for a, b in zip(one, other, strict=True)
        for part in ("keys", "values", "positions")
    )


@given(st.lists(st.integers(1, 700), min_size=1, max_size=40))
def test_any_chunks_give_the_same_cache(sizes: list[int]) -> None:
    blob = compress(cache(), INT8)
    reader, start, come = Reader(), 0, []
    while start < len(blob):
        for size in sizes:
            come += reader.feed(blob[start : start + size])
            start += size
    assert reader.complete
    assert come == [0, 1, 2]
    assert same(reader.cache(), decompress(blob))


def test_layers_attach_as_they_arrive() -> None:
    header, *frames, trailer = compress_frames(cache(), INT8)
    reader = Reader()
    assert reader.feed(header) == []
    assert reader.header is not None
    assert reader.header.recipe == INT8
    assert [s.kv_heads for s in reader.header.shapes] == [2, 2, 2]
    for index, frame in enumerate(frames):
        assert reader.feed(frame) == [index]
        assert index in reader.layers
    assert not reader.complete
    with pytest.raises(TruncatedError, match="before its trailer"):
        reader.cache()
    reader.feed(trailer)
    assert reader.complete


def in_tiers(source: KVCache, order: list[tuple[int, slice, bool]]) -> bytes:
    writer = Writer(Integer(8))
    out = [writer.header(source, 2)]
    for index, part, more in order:
        layer = source.layers[index]
        out.append(writer.frame(index, layer.take(torch.arange(layer.kept)[part].expand(2, -1)), more))
    return b"".join([*out, writer.trailer()])


def test_a_layer_may_come_in_tiers() -> None:
    source = replace(cache(layers=2), recipe="full|int8")
    odd, even = slice(1, None, 2), slice(0, None, 2)
    tiers = in_tiers(source, [(0, odd, True), (1, odd, True), (0, even, False), (1, even, False)])
    assert same(decompress(tiers), decompress(compress(source, "full|int8")))
    assert [frame.form for frame in inspect(tiers).frames] == ["coded", "frame", "coded", "frame"]


def test_ragged_layers_cross_and_may_come_in_tiers() -> None:
    recipe = "knorm@0.3,budget=head|int8"
    kept = Recipe.parse(recipe).keep(cache())
    assert all(len(set(layer.per_head)) > 1 and sum(layer.per_head) == 2 * layer.kept for layer in kept)
    blob = compress(cache(), recipe)
    restored = decompress(blob)
    assert [x.counts for x in restored] == [x.counts for x in kept]
    assert same(restored, Recipe.parse(recipe).apply(cache()))
    frames = inspect(blob).frames
    assert [frame.counts for frame in frames] == [x.counts for x in kept]
    assert {(frame.rows, frame.kept) for frame in frames} == {(2, 9)}

    writer = Writer(Integer(8))
    out = [writer.header(kept, 2)]
    for index, layer in enumerate(kept):
        for start in (0, 1):
            tier = [x.take(torch.arange(start, x.kept, 2)[None]) for x in layer.split()]
            out.append(writer.frame(index, LayerCache.join(tier), more=not start))
    assert same(decompress(b"".join([*out, writer.trailer()])), restored)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ([(0, slice(0, 5), True), (1, slice(0, 5), False)], "without all of layers 0$"),
        ([(0, slice(0, 5), False)], "without all of layers 1$"),
        ([(0, slice(0, 5), False), (0, slice(5, 9), False)], "whole already"),
        ([(0, slice(0, 5), True), (0, slice(4, 9), False)], "same token"),
        ([(0, slice(0, 5), False), (1, slice(0, 5), False)], "20 tokens came, where 124 were announced"),
    ],
)
def test_tiers_that_do_not_fit(order: list[tuple[int, slice, bool]], says: str) -> None:
    with pytest.raises(CorruptError, match=says):
        decompress(in_tiers(replace(cache(layers=2), recipe="full|int8"), order))


def test_a_token_that_comes_twice_is_found_without_decoding() -> None:
    order = [(0, slice(0, 5), True), (0, slice(4, 9), False)]
    blob = in_tiers(replace(cache(layers=2), recipe="full|int8"), order)
    reader = Reader(decode=False)
    with pytest.raises(CorruptError, match="without all of layers 1"):
        reader.feed(blob)
    with pytest.raises(CorruptError, match="same token"):
        reader.positions()


def test_frames_need_a_header() -> None:
    with pytest.raises(InputError, match="header"):
        Writer(Integer(8)).frame(0, cache().layers[0])
    writer = Writer(Integer(8))
    with pytest.raises(InputError, match="1 to 64 tiers"):
        writer.header(cache(), 65)
    writer.header(cache())
    with pytest.raises(InputError, match="more frames for layer 0 than the 1 tiers"):
        writer.frame(0, cache().layers[0], more=True)


@pytest.mark.parametrize("recipe", ["full|bf16", INT8, "none|int1", "random@0.2|int5", "knorm@0.2,budget=head|int5"])
def test_every_byte_is_accounted_for(recipe: str) -> None:
    source = cache()
    blob = compress(source, recipe)
    report = inspect(blob)
    assert report.total_bytes == len(blob)
    assert report.header_bytes + report.trailer_bytes + sum(frame.total for frame in report.frames) == len(blob)
    assert report.payload_bytes + report.overhead_bytes == len(blob)
    assert report.full_bf16_bytes == source.full_bf16_bytes
    assert report.ratio == pytest.approx(source.full_bf16_bytes / len(blob))
    assert (report.tokens, report.visual_tokens, report.layers, report.dtype) == (32, 20, 3, "bfloat16")
    assert report.as_dict()["overhead_bytes"] == report.overhead_bytes


def test_overhead_is_small() -> None:
    prompt = layout(text_before=10, rows=12, columns=12, question=40, tail=5)
    source = cache(prompt, layers=6, heads=2, dim=32)
    assert inspect(compress(source, "random@0.1|int4")).overhead_bytes < 270


def test_zstd_is_used_only_where_it_helps() -> None:
    source = cache()
    plain, packed = inspect(compress(source, "full|int8")), inspect(compress(source, "full|int8|zstd"))
    assert packed.payload_bytes <= plain.payload_bytes
    flat = replace(source, layers=tuple(replace(x, values=torch.ones_like(x.values)) for x in source))
    assert inspect(compress(flat, "full|int8|zstd")).payload_bytes < 0.7 * plain.payload_bytes


def test_not_a_bitstream() -> None:
    for blob in (b"PK\3\4", b"K" * 9, b"\x80\x04pickle"):
        with pytest.raises(CorruptError, match="not a kvferry bitstream"):
            decompress(blob)
    with pytest.raises(TruncatedError):
        decompress(b"")
    with pytest.raises(VersionError, match=r"version 4.*update it"):
        decompress(b"KVF\x04")
    with pytest.raises(VersionError, match=r"version 2.*write it again"):
        decompress(b"KVF\x02")


def test_bytes_after_the_end() -> None:
    blob = compress(cache(), INT8)
    for more in (b"\0", record(blob, Kind.FRAME, b""), record(blob, 200, b"")):
        with pytest.raises(CorruptError, match="end of the stream"):
            decompress(blob + more)


def test_newer_recipes_are_a_matter_of_version() -> None:
    for recipe in ("full|of tomorrow@x", "full"):
        header = Writer(Integer(8)).header(replace(cache(), recipe=recipe))
        with pytest.raises(VersionError, match="cannot decode the recipe"):
            Reader().feed(header)


def test_size_is_bounded_before_allocation() -> None:
    blob = compress(cache(), INT8)
    with pytest.raises(CorruptError, match="max_bytes"):
        Reader(max_bytes=1000).feed(blob)


def test_unknown_records_and_fields() -> None:
    header, *rest = compress_frames(cache(), INT8)
    blob = header + record(header, 128, b"a comment")
    with pytest.raises(CorruptError, match="kind 3 is wrong"):
        # it is skipped, but the checksums that follow were written without it
        Reader().feed(blob + b"".join(rest))
    for piece in rest:
        blob += record(blob, piece[0], piece[1 + len(write_varint(len(piece))) : -CHECKSUM.size])
    assert same(decompress(blob), decompress(compress(cache(), INT8)))
    report = inspect(blob)
    assert report.header_bytes + report.trailer_bytes + sum(frame.total for frame in report.frames) == len(blob)
    with pytest.raises(VersionError, match="kind 9"):
        Reader().feed(header + record(header, 9, b""))

    def with_field(number: int) -> bytes:
        unknown = write_varint(number << 3) + b"\1"
        return header + record(header, Kind.FRAME, pb.Frame(layer=0).SerializeToString() + unknown)

    with pytest.raises(VersionError, match="field 999 of Frame"):
        Reader().feed(with_field(999))
    with pytest.raises(CorruptError, match="not come yet"):
        Reader().feed(with_field(1000))


def test_frames_in_another_order_are_noticed() -> None:
    header, first, second, third, trailer = compress_frames(cache(), "full|int8")
    for changed in ((first, third), (second,), (first, first), (first, trailer)):
        with pytest.raises(CorruptError, match="checksum"):
            Reader().feed(header + b"".join(changed))
    assert Reader().feed(header + first + second + third) == [0, 1, 2]


def test_an_error_stays() -> None:
    reader = Reader()
    for _ in range(2):
        with pytest.raises(CorruptError):
            reader.feed(b"nonsense")
    with pytest.raises(CorruptError):
        reader.cache()


def record(before: bytes, kind: int, body: bytes) -> bytes:
    """A record to follow the stream ``before``."""
    framed = bytes([kind]) + write_varint(len(body)) + body
    return framed + CHECKSUM.pack(google_crc32c.value(before[-len(START) :] + framed))
