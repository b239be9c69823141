"""Positions, layouts and headers, each on its own."""

import contextlib
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from kvferry.bitstream import contexts, positions
from kvferry.bitstream import header as headers
from kvferry.bitstream import layout as layouts
from kvferry.bitstream.bounds import Bounds
from kvferry.bitstream.positions import Kept, Places, read_sparse, write_sparse
from kvferry.bitstream.records import ZSTD_MAGIC, compress, decompress
from kvferry.bitstream.varints import read_varint, read_varints, write_varints
from kvferry.cache import PromptLayout
from kvferry.errors import CorruptError, VersionError
from kvferry.wire import bitstream_pb2 as pb
from tests.helpers import cache, layout

LENGTHS = st.one_of(st.integers(1, 300), st.just(3000))


@st.composite
def selections(draw: st.DrawFn, length: int | None = None) -> tuple[Kept, int, int]:
    """Positions, the prompt's length and the number of heads; 3000 tokens are too many for the range coder."""
    length, heads = length or draw(LENGTHS), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    most = st.integers(0, min(length, 300))
    counts = draw(st.one_of(most.map(lambda x: [x] * heads), st.lists(most, min_size=heads, max_size=heads)))
    rows = [np.sort(rng.permutation(length)[:count]) for count in counts]
    if len(set(counts)) > 1:
        return Kept(np.concatenate(rows)[None].astype(np.int64), tuple(counts)), length, heads
    return positions.distinct(np.array(rows, np.int64).reshape(heads, -1)), length, heads


def same(one: Kept, other: Kept) -> bool:
    return one.counts == other.counts and np.array_equal(one.rows, other.rows)


def places(length: int, visual: bool = False) -> Places:
    return Places(np.full(length, visual))


@given(LENGTHS.flatmap(lambda length: st.lists(selections(length), min_size=1, max_size=4)))
def test_positions_survive(frames: list[tuple[Kept, int, int]]) -> None:
    length = frames[0][1]
    visual = np.random.default_rng(length).random(length) < 0.5
    writer, reader = Places(visual), Places(visual)
    for layer, (kept, _, heads) in enumerate(frames):
        frame = writer.write(kept, layer, heads)
        form = frame.WhichOneof("positions")
        assert len(getattr(frame, form) if form and form != "frame" else b"") <= -(-kept.heads * length // 8)
        assert same(reader.read(frame, layer, heads), kept)


@given(selections(), st.integers(2, 4))
def test_positions_in_tiers_survive(selection: tuple[Kept, int, int], tiers: int) -> None:
    whole, length, heads = selection
    writer, reader = places(length, True), places(length, True)
    for layer in (0, 1):
        for tier in range(tiers):
            mask = whole.mask(length)
            mask[:, np.arange(length) % tiers != tier] = False
            rows = [np.flatnonzero(row) for row in mask]
            counts = tuple(map(len, rows))
            ragged = len(set(counts)) > 1
            flat = np.concatenate(rows)
            kept = Kept(flat[None], counts) if ragged else positions.distinct(flat.reshape(len(rows), -1))
            assert same(reader.read(writer.write(kept, layer, heads), layer, heads), kept)


@given(selections())
def test_repeated_positions_cost_a_reference(selection: tuple[Kept, int, int]) -> None:
    kept, length, heads = selection
    other = Kept(np.zeros((1, 1), np.int64) if kept.rows.shape[1] != 1 else np.zeros((1, 0), np.int64))
    writer, reader = places(length), places(length)
    sizes = []
    for layer, rows in enumerate((kept, kept, other, kept)):
        frame = writer.write(rows, layer, heads)
        sizes.append(frame.ByteSize())
        assert same(reader.read(frame, layer, heads), rows)
    assert sizes[1] == 0
    assert sizes[3] == 2


@given(st.lists(st.integers(0, 2**35 - 1), max_size=30))
def test_varints_survive(numbers: list[int]) -> None:
    array = np.array(numbers, np.int64)
    data = write_varints(array)
    assert np.array_equal(read_varints(data, 2**35), array)
    at, read = 0, []
    while at < len(data):
        head = read_varint(data, at)
        assert head is not None
        read.append(head[0])
        at = head[1]
    assert read == numbers
    assert read_varint(b"\x80\x80", 0) is None


@given(st.integers(1, 5000), st.integers(0, 999), st.floats(0, 1))
def test_sparse_positions_are_near_their_entropy(limit: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    numbers = np.flatnonzero(rng.random(limit) < share)
    data = write_sparse(numbers, limit)
    assert np.array_equal(read_sparse(data, limit), numbers)
    if len(numbers):
        assert 8 * len(data) <= len(numbers) * (3 + np.log2(limit / len(numbers))) + 24


@pytest.mark.parametrize(
    "message",
    [
        pb.Frame(runs=b"\0\x15"),
        pb.Frame(runs=b"\0"),
        pb.Frame(runs=b"\x13\2"),
        pb.Frame(runs=b"\0\1\0\1\0\0\x12\x81"),
        pb.Frame(runs=b"\0\xff\xff\xff\xff\x7f"),
        pb.Frame(runs=b"\0\xff\xff\xff\xff\xff\x01"),
        pb.Frame(shared=True, runs=b"\x09\2"),
        pb.Frame(bitmap=b"\0\0"),
        pb.Frame(bitmap=b"\0\0\0\0"),
        pb.Frame(bitmap=b"\0\0\xff"),
        pb.Frame(shared=True, bitmap=b"\0\x0c"),
        pb.Frame(sparse=b""),
        pb.Frame(sparse=b"\x80"),
        pb.Frame(sparse=b"\2"),
        pb.Frame(sparse=b"\0\xff"),
        pb.Frame(sparse=b"\1\0\0"),
        pb.Frame(sparse=b"\1\x0f\2"),
        pb.Frame(sparse=b"\xff\xff\xff\xff\x0f\1"),
        pb.Frame(coded=bytes(9)),
        pb.Frame(frame=1),
        pb.Frame(frame=2**32 - 1),
        pb.Frame(frame=0, shared=True),
        pb.Frame(shared=True),
    ],
)
def test_positions_that_cannot_be(message: pb.Frame) -> None:
    memory = places(10)
    memory.write(Kept(np.array([[1]])), 0, 2)
    with pytest.raises(CorruptError):
        memory.read(message, 1, 2)


def test_positions_before_any_frame_or_of_other_heads() -> None:
    with pytest.raises(CorruptError, match="not come yet"):
        places(10).read(pb.Frame(), 0, 1)
    memory = places(10)
    memory.write(Kept(np.array([[1], [2]])), 0, 2)
    with pytest.raises(CorruptError, match="another shape"):
        memory.read(pb.Frame(), 1, 3)
    with pytest.raises(CorruptError, match="possible are 4096"):
        places(5000).read(pb.Frame(coded=b""), 0, 1)


@given(st.binary(max_size=40))
def test_any_bytes_are_coded_positions_or_refused(data: bytes) -> None:
    with contextlib.suppress(CorruptError):
        kept = places(50, True).read(pb.Frame(coded=data), 0, 2)
        assert kept.mask(50).shape == (2, 50)


def assert_same(one: PromptLayout, other: PromptLayout) -> None:
    for name, dtype in {"token_ids": "i4", "modality": "u1", "role": "u1", "positions": "i4"}.items():
        assert np.array_equal(getattr(one, name), getattr(other, name))
        assert getattr(other, name).dtype == dtype
    assert (one.rope_delta, one.grids) == (other.rope_delta, other.grids)


def test_a_picture_costs_a_few_bytes() -> None:
    message = layouts.encode(layout(rows=30, columns=40))
    assert not message.positions
    assert message.ByteSize() < 45
    assert_same(layout(rows=30, columns=40), layouts.decode(message))


@given(st.integers(0, 999), st.sampled_from([1, 3]), st.integers(1, 60))
def test_any_layout_survives(seed: int, axes: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    odd = PromptLayout(
        token_ids=rng.integers(0, 2**31 - 1, n).astype(np.int32),
        modality=rng.integers(0, 3, n).astype(np.uint8),
        role=rng.integers(0, 3, n).astype(np.uint8),
        positions=rng.integers(-(2**31), 2**31 - 1, (axes, n)).astype(np.int32) // 2,
        rope_delta=int(rng.integers(-5000, 5000)),
        grids=((1, 2, 3),),
    )
    assert_same(odd, layouts.decode(layouts.encode(odd)))


def test_positions_are_sent_where_they_do_not_follow() -> None:
    odd = layout()
    odd = replace(odd, positions=odd.positions + np.array([[0], [1], [0]], np.int32))
    message = layouts.encode(odd)
    assert len(message.positions) == 3 * len(odd)
    assert_same(odd, layouts.decode(message))


def test_two_pictures_and_text_only() -> None:
    modality = np.array([0, 1, 1, 1, 1, 0, 1, 1, 0], np.uint8)
    expected = [[0, 1, 1, 1, 1, 3, 4, 4, 6], [0, 1, 1, 2, 2, 3, 4, 4, 6], [0, 1, 2, 1, 2, 3, 4, 5, 6]]
    followed = layouts.follow(modality, ((1, 2, 2), (1, 1, 2)), 3)
    assert followed is not None
    assert followed.tolist() == expected
    assert layouts.follow(modality, ((1, 2, 2),), 3) is None
    assert layouts.follow(modality, ((1, 2, 3), (1, 1, 2)), 3) is None
    flat = layouts.follow(modality, (), 1)
    assert flat is not None
    assert flat.tolist() == [list(range(9))]


@pytest.mark.parametrize(
    "change",
    [
        {"axes": 2},
        {"segments": []},
        {"segments": [0, 0]},
        {"segments": [2]},
        {"segments": [2, 1]},
        {"segments": [2**32 - 1, 1, 1]},
        {"segments": [2, 1, 2**32 - 1]},
        {"segments": [2, 7, 1]},
        {"segments": [2, 25, 1]},
        {"segments": [2, 0]},
        {"segments": [2, 1, 1], "token_ids": [3]},
        {"segments": [2, 3, 1], "axes": 3},
        {"segments": [2, 3, 1], "axes": 3, "grids": [1, 2]},
        {"segments": [2, 3, 1], "axes": 3, "grids": [0, 2, 2]},
        {"segments": [2, 1, 1], "positions": [1]},
        {"segments": [2, 1, 1], "positions": [2**31 - 1, 2**31 - 1]},
    ],
)
def test_layouts_that_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(CorruptError):
        layouts.decode(pb.Layout(**change))  # type: ignore[arg-type]


def test_a_fingerprint_takes_half_its_letters() -> None:
    for fingerprint, size in (("ab" * 32, 32), ("AB", 0), ("abc", 0), ("", 0), ("sha:ab", 0)):
        message = headers.encode(replace(cache(), fingerprint=fingerprint))
        assert len(message.digest) == size
        assert headers.decode(message, Bounds(1 << 30)).fingerprint == fingerprint


@pytest.mark.parametrize(
    "layer",
    [
        {"repeat": 0},
        {"repeat": 2**32 - 1},
        {"kv_heads": 0},
        {"key_dim": 2**31},
        {"value_dim": 65537},
        {"dtype": 77},
        {"kv_heads": 65536, "key_dim": 65536},
    ],
)
def test_headers_that_cannot_be(layer: dict[str, int]) -> None:
    message = headers.encode(cache())
    good = {"repeat": 1, "kv_heads": 2, "key_dim": 8, "value_dim": 8, "dtype": 1}
    message.layers.append(pb.LayerShape(**{**good, **layer}))  # type: ignore[arg-type]
    with pytest.raises(CorruptError):
        headers.decode(message, Bounds(1 << 30))


@pytest.mark.parametrize("change", [{"pending": 32}, {"pending": 2**32 - 1}, {"tiers": 65}])
def test_lengths_and_tiers_that_cannot_be(change: dict[str, int]) -> None:
    message = headers.encode(cache())
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(CorruptError):
        headers.decode(message, Bounds(1 << 30))


def test_values_of_another_width_than_keys() -> None:
    one = cache(layers=1)
    wide = replace(one, layers=(replace(one.layers[0], values=one.layers[0].keys.repeat(1, 1, 2)),))
    for source, size in ((one, 0), (wide, 16)):
        message = headers.encode(source)
        assert message.layers[0].value_dim == size
        shape = headers.decode(message, Bounds(1 << 30)).shapes[0]
        assert (shape.key_dim, shape.value_dim) == (8, size or 8)


def test_an_unknown_lossless_stage_is_a_matter_of_version() -> None:
    assert not headers.lossless("full|bf16")
    assert headers.lossless("full|bf16|zstd")
    with pytest.raises(VersionError, match="lossless"):
        headers.lossless("full|bf16|brotli")


def test_decompression_is_bounded() -> None:
    bomb = compress(bytes(1 << 20))
    assert len(bomb) < 200
    assert not bomb.startswith(ZSTD_MAGIC)
    with pytest.raises(CorruptError, match="at most 1000"):
        decompress(bomb, 1000)
    for broken in (bomb[:-1], bomb + b"x", b"", b"zzzz"):
        with pytest.raises(CorruptError):
            decompress(broken, 1 << 20)


@given(st.integers(0, 9999), st.integers(1, 4), st.floats(0, 1))
def test_compiled_decisions_are_the_same(seed: int, rows: int, density: float) -> None:
    """Several frames, each guided by the one before; with bytes that are left over, both say so."""
    compiled = pytest.importorskip("kvferry.bitstream.binary_kernels")
    random = np.random.default_rng(seed)
    visual = random.random(70) < 0.5
    writer, plain, fast = (contexts.Contexts(visual) for _ in range(3))
    guide, held = None, np.zeros((rows, 70), bool)
    for _ in range(3):
        mask = (random.random((rows, 70)) < density) & ~held
        data = writer.encode(mask, held, guide)
        out = np.zeros_like(mask)
        fast._decide(compiled, np.frombuffer(data, np.uint8), held, guide, out)
        assert np.array_equal(out, mask)
        assert np.array_equal(plain.decode(data, held, guide), mask)
        assert (fast._weights.ones, fast._weights.zeros) == (plain._weights.ones, plain._weights.zeros)
        with pytest.raises(CorruptError, match="more bytes"):
            contexts.Contexts(visual)._decide(compiled, np.zeros(400, np.uint8), held, guide, out)
        guide, held = mask, held | mask
