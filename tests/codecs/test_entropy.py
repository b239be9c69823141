"""The entropy coder: exact, as short as the entropy says, the same on every machine, and safe with any bytes."""

import zlib
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

from kvferry.codecs import entropy
from kvferry.codecs.entropy import REACH, SCALES, TOTAL, Adaptive, Decoder, Encoder, Models, Symbols, gaussian, laplace
from kvferry.errors import CorruptError, InputError

FAMILIES: tuple[Callable[[], Models], ...] = (laplace, gaussian)


def deviation(row: int) -> float:
    return 2.0 ** ((row - 32) / 8)


def draw(groups: int, count: int, seed: int = 0) -> tuple[Symbols, np.ndarray]:
    generator = np.random.default_rng(seed)
    wide = 2 ** generator.uniform(-2, 5, groups)
    numbers = np.rint(generator.standard_normal((groups, count)) * wide[:, None]).astype(np.int32)
    return numbers.reshape(-1), np.full(groups, count)


@given(st.data())
def test_any_symbols_survive(data: st.DataObject) -> None:
    counts = np.array(data.draw(st.lists(st.integers(0, 9), max_size=5)), int)
    edges = st.sampled_from([-(2**31), -256, -255, -254, 0, 254, 255, 256, 2**31 - 1])
    symbols = data.draw(npst.arrays(np.int32, int(counts.sum()), elements=st.integers(-(2**31), 2**31 - 1) | edges))
    which = np.array([data.draw(st.integers(0, SCALES - 1)) for _ in counts], int)
    models = data.draw(st.sampled_from(FAMILIES))()
    payload = entropy.encode(symbols, counts, which, models)
    assert np.array_equal(entropy.decode(payload, counts, which, models), symbols)


@pytest.mark.parametrize(("groups", "count"), [(8, 20_000), (256, 400)])
def test_bits_are_those_of_the_entropy(groups: int, count: int) -> None:
    symbols, counts = draw(groups, count)
    models = Models.from_counts(entropy.histograms(symbols, counts, REACH))
    bits = 8 * len(entropy.encode(symbols, counts, np.arange(groups), models))
    least = entropy.shannon_bits(symbols, counts)
    assert least <= bits <= 1.002 * least


def test_a_family_comes_within_two_percent_of_the_entropy() -> None:
    symbols, counts = draw(16, 20_000)
    which = entropy.fit(symbols, counts, gaussian())
    assert 8 * len(entropy.encode(symbols, counts, which, gaussian())) <= 1.02 * entropy.shannon_bits(symbols, counts)


def test_shannon_bits_count_each_group_apart() -> None:
    symbols = np.array([0, 0, 0, 0, 5, 5, 1, 2], np.int32)
    assert entropy.shannon_bits(symbols, np.array([4, 4])) == pytest.approx(4 * 1.5)
    assert entropy.shannon_bits(symbols, np.array([8])) == pytest.approx(4 * 1 + 2 * 2 + 2 * 3)


@pytest.mark.parametrize("row", [0, 13, 32, 60, SCALES - 1])
@pytest.mark.parametrize(
    ("family", "density"),
    [(laplace, lambda d: stats.laplace(0, d / 2**0.5)), (gaussian, lambda d: stats.norm(0, d))],
)
def test_families_are_the_densities_they_name(family: Callable[[], Models], density: Any, row: int) -> None:
    ends = np.arange(-REACH, REACH) + 0.5
    mass = np.diff(density(deviation(row)).cdf(ends), prepend=0.0, append=1.0)
    assert np.abs(family().frequencies[row] / TOTAL - mass).max() < 5e-5


def test_nearest_is_the_inverse_of_the_scales() -> None:
    rows = np.arange(SCALES)
    assert np.array_equal(entropy.nearest(deviation(rows)), rows)
    assert entropy.nearest([0.0, 1e9]).tolist() == [0, SCALES - 1]


def test_tables_and_bytes_are_the_same_everywhere() -> None:
    """What other machines and versions of constriction must give, too: they read each other's streams."""
    tables = [zlib.crc32(family().frequencies.astype("<i8").tobytes()) for family in FAMILIES]
    assert tables == [819291729, 896801208]
    symbols = np.array([3, -1, 0, 0, 2, 300, -70_000, 7, 0, -12], np.int32)
    payload = entropy.encode(symbols, np.array([6, 4]), np.array([40, 55]), laplace())
    assert payload.hex() == "c3161fed790a90e0374803693be0c752"
    encoder = Encoder()
    encoder.adaptive(np.arange(40).reshape(4, 10) ** 2 % 7, 7)
    encoder.words(np.array([[16000, 16010, 15990]], np.uint16))
    assert encoder.finish().hex() == "7c71ab0b45ae436f62b361bdd4a2336f5452bb5c"


def test_frequencies_are_coded_as_they_are() -> None:
    """The probabilities in constriction are the integers themselves, down to the smallest."""
    models = Models.from_counts(np.array([[0, 0, 1, 1 << 20, 1 << 10, 0, 0]]))
    assert models.frequencies.sum() == TOTAL
    for symbol in (-2, -1, 0, 1, 2):
        share = models.frequencies[0, symbol + 3] / TOTAL
        payload = entropy.encode(np.full(1000, symbol, np.int32), np.array([1000]), np.array([0]), models)
        assert 8 * len(payload) == pytest.approx(-1000 * np.log2(share), abs=64)


@given(st.integers(0, 6), st.integers(0, 30), st.integers(1, 40), st.integers(0, 999))
def test_everything_in_one_stream_survives(rows: int, n: int, alphabet: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    symbols = generator.integers(0, alphabet + 1, (rows, n))
    words = generator.integers(0, 1 << 16, (rows, n)).astype(np.uint16)
    many = generator.integers(0, 2 ** generator.integers(1, 32, n), dtype=np.int64)
    encoder = Encoder()
    encoder.adaptive(symbols, alphabet + 1)
    encoder.words(words)
    encoder.excess(many)
    encoder.numbers(symbols.reshape(-1), alphabet + 1)
    decoder = Decoder(encoder.finish())
    assert np.array_equal(decoder.adaptive(rows, n, alphabet + 1), symbols)
    assert np.array_equal(decoder.words(rows, n), words)
    assert np.array_equal(decoder.excess(n), many)
    assert np.array_equal(decoder.numbers(rows * n, alphabet + 1), symbols.reshape(-1))
    decoder.finish()


def test_adaptive_models_learn_what_a_row_is_like() -> None:
    generator = np.random.default_rng(0)
    symbols = np.repeat(generator.integers(0, 16, (40, 1)), 400, 1)
    noisy = np.where(generator.random(symbols.shape) < 0.1, generator.integers(0, 16, symbols.shape), symbols)
    encoder = Encoder()
    encoder.adaptive(noisy, 16)
    bits = 8 * len(encoder.finish())
    least = entropy.shannon_bits(noisy.reshape(-1).astype(np.int32), np.full(40, 400))
    assert least < bits < 1.5 * least
    assert bits < 0.3 * 4 * noisy.size


def test_adaptive_frequencies_are_whole_and_sum_to_all() -> None:
    model = Adaptive(3, 5)
    for column in np.random.default_rng(0).integers(0, 5, (50, 3)):
        rows = model.edges().astype(np.int64)
        assert (rows[:, 0] == 0).all()
        assert (rows[:, -1] == TOTAL).all()
        assert (np.diff(rows) > 0).all()
        model.update(column)


@given(st.binary(max_size=80), st.lists(st.integers(0, 30), max_size=4), st.integers(0, 99))
def test_any_bytes_give_numbers_or_a_named_error(payload: bytes, counts: list[int], seed: int) -> None:
    which = np.random.default_rng(seed).integers(0, SCALES, len(counts))
    try:
        symbols = entropy.decode(payload, np.array(counts, int), which, laplace())
    except CorruptError:
        return
    assert symbols.dtype == np.int32
    assert len(symbols) == sum(counts)


def test_bytes_too_many_or_cut_inside_a_word_are_corrupt() -> None:
    symbols, counts = draw(4, 100)
    which = entropy.fit(symbols, counts, laplace())
    payload = entropy.encode(symbols, counts, which, laplace())
    for wrong in (payload[:-1], payload + b"\0", payload + bytes(8), b""):
        with pytest.raises(CorruptError):
            entropy.decode(wrong, counts, which, laplace())
    with pytest.raises(CorruptError):
        entropy.decode(b"\0\0\0\0", np.array([0]), np.array([0]), laplace())


def test_frequencies_that_are_none_are_refused() -> None:
    for rows in (np.ones((1, 3), int), np.full((1, 4), TOTAL // 4), np.array([[TOTAL, 0, 0]])):
        with pytest.raises(InputError, match="frequencies"):
            Models(rows)
    with pytest.raises(InputError, match="counts"):
        Models.from_counts(np.array([[-1, 2, 3]]))
