"""One set of visual tokens: it comes back, it is small, and what is no set is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.bitstream.binary import BitReader, Weights, encode_bits
from kvferry.bitstream.sets import Mask, decode_set, encode_set
from kvferry.errors import CorruptError
from kvferry.wire.modes_pb2 import PositionSet

Grids = list[tuple[int, int, int]]
GRIDS = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)), min_size=0, max_size=3)


@st.composite
def sets(draw: st.DrawFn) -> tuple[Mask, Mask, Grids]:
    """A set, an earlier one, and the grids (or none that are known)."""
    grids = draw(GRIDS)
    tokens = sum(math.prod(grid) for grid in grids)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask, base = rng.random(tokens) < share, rng.random(tokens) < share
    return mask, base, grids if draw(st.booleans()) else []


@given(sets())
def test_comes_back_in_at_most_a_bit_a_token(given: tuple[Mask, Mask, Grids]) -> None:
    mask, base, grids = given
    for earlier, handle in ((None, 0), (base, 1 << 31)):
        message = encode_set(mask, grids, earlier, handle)
        assert message.base == handle
        again = PositionSet.FromString(message.SerializeToString())
        np.testing.assert_array_equal(decode_set(again, len(mask), grids, earlier), mask)
        form = getattr(message, message.WhichOneof("form"))
        assert len(form) <= -(-len(mask) // 8)
        assert message.ByteSize() <= len(form) + (2 if len(form) < 128 else 3) + (6 if handle else 0)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=3000), st.booleans())
def test_arithmetic_coder(decisions: list[tuple[int, int]], all_ones: bool) -> None:
    bits = [1 if all_ones else bit for bit, _ in decisions]
    contexts = [context for _, context in decisions]
    reader = BitReader(encode_bits(bits, contexts, Weights(4)), Weights(4))
    assert [reader.read(context) for context in contexts] == bits


def test_arithmetic_coder_comes_near_the_entropy() -> None:
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, 2, 4000).tolist()
    bits = (rng.random(4000) < np.where(contexts, 0.02, 0.3)).astype(int).tolist()
    entropy = sum(-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in np.where(contexts, 0.02, 0.3))
    assert 0.9 * entropy < 8 * len(encode_bits(bits, contexts, Weights(2))) < 1.05 * entropy + 40


def test_what_is_kept_together_takes_less() -> None:
    """A block of a picture, and the same number of tokens all over it."""
    block = np.zeros((14, 14), np.bool_)
    block[3:10, 4:11] = True
    scattered = np.random.default_rng(0).permutation(block.ravel())
    sizes = [encode_set(mask, [(1, 14, 14)]).ByteSize() for mask in (block.ravel(), scattered)]
    assert sizes[0] < 0.7 * sizes[1]
    assert sizes[1] < 2 * block.sum() / 3  # of the sources' 16-bit list


def test_a_change_takes_less_than_the_set() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(200) < 0.25
    mask = base.copy()
    mask[[20, 21, 150]] ^= True
    whole, change = encode_set(mask, [(1, 10, 20)]), encode_set(mask, [(1, 10, 20)], base, handle=3)
    assert change.ByteSize() < 0.6 * whole.ByteSize()
    assert not np.array_equal(decode_set(change, 200, [(1, 10, 20)], ~base), mask)


@pytest.mark.parametrize(
    "message",
    [
        PositionSet(bitmap=b"\0\0\0"),
        PositionSet(),
        PositionSet(bitmap=b"\0"),
        PositionSet(bitmap=b"\0\xf0"),
        PositionSet(runs=b"\x01"),
        PositionSet(runs=b"\x0a\x03"),
        PositionSet(runs=b"\x01\x00"),
        PositionSet(runs=b"\x80"),
        PositionSet(coded=bytes(13)),
    ],
)
def test_refused(message: PositionSet) -> None:
    with pytest.raises(CorruptError):
        decode_set(message, 12, [(1, 3, 4)])


@given(st.binary(max_size=12))
def test_any_bytes_are_a_set_or_refused(data: bytes) -> None:
    for form in ("bitmap", "runs", "coded"):
        message = PositionSet(**{form: data})
        try:
            assert decode_set(message, 12, [(1, 3, 4)]).shape == (12,)
        except CorruptError:
            continue
