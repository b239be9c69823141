"""Positions, layouts and headers, each on its own."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from kvferry.bitstream import header as headers
from kvferry.bitstream import layout as layouts
from kvferry.bitstream import positions
from kvferry.bitstream.records import compress, decompress
from kvferry.cache import PromptLayout
from kvferry.errors import CorruptError
from kvferry.wire import bitstream_pb2 as pb
from tests.helpers import cache, layout


@st.composite
def selections(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    length, heads = draw(st.integers(1, 300)), draw(st.integers(1, 4))
    kept = draw(st.integers(0, length))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    rows = [np.sort(rng.permutation(length)[:kept]) for _ in range(heads)]
    return np.array(rows, np.int64).reshape(heads, kept), length


@given(selections())
def test_positions_survive(selection: tuple[np.ndarray, int]) -> None:
    rows, length = selection
    message = positions.encode(positions.distinct(rows), length, {})
    back = positions.decode(message, length, len(rows), [])
    assert np.array_equal(np.broadcast_to(back.rows, rows.shape), rows)
    form = message.WhichOneof("form")
    assert len(getattr(message, form)) <= -(-len(back.rows) * length // 8)


@given(selections())
def test_repeated_positions_cost_a_reference(selection: tuple[np.ndarray, int]) -> None:
    rows, length = selection
    distinct = positions.distinct(rows)
    message = positions.encode(distinct, length, {distinct.key: 5})
    assert message.frame == 5
    assert message.ByteSize() <= 7
    assert positions.decode(message, length, len(rows), [distinct] * 6) is distinct


@st.composite
def ragged(draw: st.DrawFn) -> tuple[positions.Kept, int]:
    length, heads = draw(st.integers(1, 300)), draw(st.integers(2, 4))
    counts = draw(st.lists(st.integers(0, length), min_size=heads, max_size=heads).filter(lambda x: len(set(x)) > 1))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    rows = [np.sort(rng.permutation(length)[:count]) for count in counts]
    return positions.Kept(np.concatenate(rows)[None].astype(np.int64), tuple(counts)), length


@given(ragged())
def test_ragged_positions_survive(selection: tuple[positions.Kept, int]) -> None:
    kept, length = selection
    message = positions.encode(kept, length, {})
    back = positions.decode(message, length, kept.heads, [])
    assert back.counts == kept.counts
    assert np.array_equal(back.rows, kept.rows)
    again = positions.encode(kept, length, {kept.key: 2})
    assert positions.decode(again, length, kept.heads, [back] * 3) is back
    for wrong in (replace_field(message, ragged=False), replace_field(message, kept=message.kept + 1)):
        with pytest.raises(CorruptError):
            positions.decode(wrong, length, kept.heads, [])
    with pytest.raises(CorruptError):
        positions.decode(replace_field(again, ragged=False), length, kept.heads, [back] * 3)


def replace_field(message: pb.Positions, **fields: int) -> pb.Positions:
    changed = pb.Positions()
    changed.CopyFrom(message)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


@given(st.lists(st.integers(0, 2**35 - 1), max_size=30))
def test_varints_survive(numbers: list[int]) -> None:
    array = np.array(numbers, np.int64)
    assert np.array_equal(positions.read_varints(positions.write_varints(array), 2**35), array)


@pytest.mark.parametrize(
    "message",
    [
        pb.Positions(kept=1),
        pb.Positions(kept=11, runs=b"\0\x0b"),
        pb.Positions(kept=2, rows=3, bitmap=b"\0\0"),
        pb.Positions(kept=2, bitmap=b"\xff\3"),
        pb.Positions(kept=2, bitmap=b"\3"),
        pb.Positions(kept=2, bitmap=b"\0\x0c"),
        pb.Positions(kept=2, gaps=b"\0"),
        pb.Positions(kept=2, gaps=b"\0\x80"),
        pb.Positions(kept=2, gaps=b"\x08\5"),
        pb.Positions(kept=2, gaps=b"\0\xff\xff\xff\xff\x7f"),
        pb.Positions(kept=2, gaps=b"\0\xff\xff\xff\xff\xff\x01"),
        pb.Positions(kept=2, runs=b"\0"),
        pb.Positions(kept=2, runs=b"\0\3"),
        pb.Positions(kept=2, runs=b"\x09\2"),
        pb.Positions(kept=2, frame=1),
        pb.Positions(kept=2, rows=2, runs=b"\0\3\7\1"),
        pb.Positions(kept=4, rows=2, ragged=True, runs=b"\0\2\x08\2"),
        pb.Positions(kept=3, rows=2, ragged=True, runs=b"\0\2\x08\2"),
        pb.Positions(kept=21, rows=2, ragged=True, runs=b"\0\x15"),
        pb.Positions(kept=3, ragged=True, runs=b"\0\3"),
        pb.Positions(kept=3, rows=3, ragged=True, runs=b"\0\3"),
        pb.Positions(kept=2**32 - 1, rows=2, ragged=True, bitmap=b"\xff\xff\xff"),
        pb.Positions(kept=2, rows=2, ragged=True, gaps=b"\x12\1"),
        pb.Positions(kept=1, ragged=True, frame=0),
    ],
)
def test_positions_that_cannot_be(message: pb.Positions) -> None:
    with pytest.raises(CorruptError):
        positions.decode(message, 10, 2, [positions.Kept(np.array([[1]]))])


def assert_same(one: PromptLayout, other: PromptLayout) -> None:
    for name, dtype in {"token_ids": "i4", "modality": "u1", "role": "u1", "positions": "i4"}.items():
        assert np.array_equal(getattr(one, name), getattr(other, name))
        assert getattr(other, name).dtype == dtype
    assert (one.rope_delta, one.grids) == (other.rope_delta, other.grids)


def test_a_picture_costs_a_few_bytes() -> None:
    message = layouts.encode(layout(rows=30, columns=40))
    assert not message.positions
    assert message.ByteSize() < 80
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
        {"segments": [pb.Segment(count=0)]},
        {"segments": [pb.Segment(count=2**32 - 1, fill=1)]},
        {"segments": [pb.Segment(count=2, fill=2**32 - 1)]},
        {"segments": [pb.Segment(count=2, kind=3, fill=1)]},
        {"segments": [pb.Segment(count=2, kind=12, fill=1)]},
        {"segments": [pb.Segment(count=2)]},
        {"segments": [pb.Segment(count=2, fill=1)], "token_ids": [3]},
        {"segments": [pb.Segment(count=2, kind=1, fill=1)], "axes": 3},
        {"segments": [pb.Segment(count=2, fill=1)], "positions": [1]},
        {"segments": [pb.Segment(count=2, fill=1)], "positions": [2**31 - 1, 2**31 - 1]},
    ],
)
def test_layouts_that_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(CorruptError):
        layouts.decode(pb.Layout(**{"axes": 1, **change}))  # type: ignore[arg-type]


def test_a_fingerprint_takes_half_its_letters() -> None:
    for fingerprint, size in (("ab" * 32, 32), ("AB", 0), ("abc", 0), ("", 0), ("sha:ab", 0)):
        message = headers.encode(replace(cache(), fingerprint=fingerprint))
        assert len(message.digest) == size
        assert headers.decode(message, 1 << 30).fingerprint == fingerprint


@pytest.mark.parametrize(
    "layer",
    [
        {"repeat": 0},
        {"repeat": 2**32 - 1},
        {"kv_heads": 0},
        {"key_dim": 2**31},
        {"value_dim": 0},
        {"dtype": 0},
        {"dtype": 77},
        {"kv_heads": 65536, "key_dim": 65536},
    ],
)
def test_headers_that_cannot_be(layer: dict[str, int]) -> None:
    message = headers.encode(cache())
    good = {"repeat": 1, "kv_heads": 2, "key_dim": 8, "value_dim": 8, "dtype": 1}
    message.layers.append(pb.LayerShape(**{**good, **layer}))  # type: ignore[arg-type]
    with pytest.raises(CorruptError):
        headers.decode(message, 1 << 30)


@pytest.mark.parametrize("length", [0, 33])
def test_lengths_that_cannot_be(length: int) -> None:
    message = headers.encode(cache())
    message.length = length
    with pytest.raises(CorruptError):
        headers.decode(message, 1 << 30)


def test_decompression_is_bounded() -> None:
    bomb = compress(bytes(1 << 20))
    assert len(bomb) < 200
    with pytest.raises(CorruptError, match="at most 1000"):
        decompress(bomb, 1000)
    for broken in (bomb[:-1], bomb + b"x", b"", b"zzzz"):
        with pytest.raises(CorruptError):
            decompress(broken, 1 << 20)
