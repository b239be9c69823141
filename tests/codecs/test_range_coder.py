"""Three range coders, one stream: Python's loops, the same compiled by numba, and the library constriction."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvferry.codecs import entropy, range_coder
from kvferry.codecs.densities import laplace
from kvferry.codecs.frequencies import TOTAL, Adaptive, Models, edges_of
from kvferry.errors import CorruptError, InputError
from tests.codecs.test_transform import make


class Way(NamedTuple):
    """What writes and what reads."""

    writer: Callable[[], Any]
    reader: Callable[[np.ndarray], Any]


def ways() -> dict[str, Way]:
    found = {"plain": Way(range_coder.Writer, range_coder.Reader)}
    try:
        from kvferry.codecs import range_kernels as fast

        found["compiled"] = Way(fast.writer, fast.reader)
    except ImportError:
        pass
    try:
        from kvferry.codecs import range_library

        found["library"] = Way(range_library.Writer, range_library.Reader)
    except ImportError:
        pass
    return found


WAYS = ways()
EACH = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Fixed(NamedTuple):
    """Models that could have learnt this."""

    frequencies: np.ndarray

    def edges(self) -> np.ndarray:
        return edges_of(self.frequencies)

    def probabilities(self) -> np.ndarray:
        return self.frequencies - 1.0


class Step(NamedTuple):
    """One call: what is written, by which method, and what both ends know."""

    columns: np.ndarray
    method: str
    known: tuple[Any, ...]


def skewed(generator: np.random.Generator, rows: int, alphabet: int) -> np.ndarray:
    """Frequencies of which some are 1 and some nearly all."""
    weights = 2 ** generator.integers(0, 30, (rows, alphabet)) * generator.integers(0, 2, (rows, alphabet))
    frequencies = 1 + weights * (TOTAL - alphabet) // np.maximum(weights.sum(1, keepdims=True), 1)
    frequencies[:, generator.integers(alphabet)] += TOTAL - frequencies.sum(1)
    return frequencies


def pick(generator: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Symbols anywhere, or all at one end, where carries come from."""
    how = generator.integers(3)
    chosen = (generator.integers(0, sizes), np.zeros_like(sizes), sizes - 1)[how]
    return np.where(generator.random(len(sizes)) < 0.9, chosen, generator.integers(0, sizes)).astype(np.int32)


def step(generator: np.random.Generator, kind: str, count: int) -> Step:
    if kind == "uniform":
        sizes = generator.integers(2, 2 ** generator.integers(2, 17), count)
        return Step(pick(generator, sizes), kind, (sizes,))
    if kind == "apart":
        frequencies = skewed(generator, count, int(generator.integers(2, 40)))
        return Step(pick(generator, np.full(count, frequencies.shape[1])), kind, (Fixed(frequencies),))
    models = (laplace(), Models(skewed(generator, 5, 7)), Models(skewed(generator, 2, 3)))[generator.integers(3)]
    counts = generator.multinomial(count, np.full(4, 0.25))
    which = generator.integers(0, len(models.frequencies), 4)
    return Step(pick(generator, np.full(count, 2 * models.reach + 1)), kind, (counts, which, models))


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    kinds = draw(st.lists(st.sampled_from(["uniform", "apart", "groups"]), min_size=1, max_size=5))
    return [step(generator, kind, draw(st.integers(1, 60))) for kind in kinds]


def write(way: Way, plan: list[Step]) -> bytes:
    writer = way.writer()
    for columns, method, known in plan:
        getattr(writer, method)(columns, *known)
    return bytes(writer.finish())


def read(way: Way, payload: bytes, plan: list[Step]) -> tuple[list[list[int]], bool | str]:
    """Symbols up to the first that there is none for, and whether the reader thinks that this was all."""
    reader = way.reader(np.frombuffer(payload, "<u4").astype(np.uint32))
    seen: list[list[int]] = []
    for _, method, known in plan:
        try:
            seen.append(getattr(reader, method)(*known).tolist())
        except CorruptError:
            return seen, "corrupt"
    return seen, reader.exhausted()


@settings(max_examples=300)
@given(steps())
def test_all_write_the_same_bytes_and_read_them(plan: list[Step]) -> None:
    payloads = {write(way, plan) for way in WAYS.values()}
    assert len(payloads) == 1
    payload = payloads.pop()
    for way in WAYS.values():
        seen, exhausted = read(way, payload, plan)
        assert seen == [x.columns.tolist() for x in plan]
        assert exhausted is True


@settings(max_examples=300)
@given(
    steps(),
    st.lists(st.sampled_from([0, 1, 2**32 - 1]) | st.integers(0, 2**32 - 1), max_size=12),
    st.integers(0, 9),
    st.integers(0, 4),
)
def test_all_read_the_same_from_any_words(plan: list[Step], words: list[int], kept: int, change: int) -> None:
    """A stream cut, longer or wrong at one place, and words that are none."""
    written = np.frombuffer(write(WAYS["plain"], plan), "<u4")
    wrong = written.copy()
    wrong[len(wrong) // 2 :][:1] ^= np.uint32(1 << change * 7)
    hostile = np.array(words, np.uint32)
    for stream in (written[:-1], written[:kept], np.append(written, hostile), wrong, hostile):
        results = [read(way, stream.astype("<u4").tobytes(), plan) for way in WAYS.values()]
        assert all(result == results[0] for result in results)


@given(st.integers(1, 9), st.integers(2, 40), st.integers(0, 999))
def test_compiled_models_learn_the_same(rows: int, alphabet: int, seed: int) -> None:
    kernels = pytest.importorskip("kvferry.codecs.range_kernels")
    plain, compiled = Adaptive(rows, alphabet), kernels.Adaptive(rows, alphabet)
    for column in np.random.default_rng(seed).binomial(alphabet - 1, 0.2, (30, rows)):
        assert np.array_equal(plain.edges(), compiled.edges())
        assert np.array_equal(np.diff(plain.edges()) - 1.0, compiled.probabilities())
        plain.update(column)
        compiled.update(column)


@EACH
def test_nothing_written_is_no_bytes(way: Way) -> None:
    assert bytes(way.writer().finish()) == b""
    assert way.reader(np.zeros(0, np.uint32)).exhausted()
    assert not way.reader(np.zeros(3, np.uint32)).exhausted()


def test_seals_that_carry_into_words_already_there() -> None:
    """Symbols around the number 40000000, 0, 0, ...: the words are 3fffffff, ffffffff, ... until the end is known."""
    sizes = np.full(90, 3)
    symbols = WAYS["plain"].reader(np.array([0x40000000, 0, 0, 0, 0], np.uint32)).uniform(sizes)
    carried = 0
    for count in range(1, 91):
        plan = [Step(symbols[:count], "uniform", (sizes[:count],))]
        payload = write(WAYS["plain"], plan)
        for way in WAYS.values():
            assert write(way, plan) == payload
            assert read(way, payload, plan) == ([symbols[:count].tolist()], True)
        writer = range_coder.Writer()
        writer.uniform(symbols[:count], sizes[:count])
        carried += writer._at > 1 and writer._words[0] == 0x3FFFFFFF and payload[:4] == bytes([0, 0, 0, 0x40])
    assert carried


@EACH
def test_words_that_no_symbol_gives_are_corrupt(way: Way) -> None:
    """All ones lie in what is left over where the interval is no multiple of 2**24."""
    reader = way.reader(np.full(4, 2**32 - 1, np.uint32))
    with pytest.raises(CorruptError, match="no symbols give"):
        reader.uniform(np.full(3, 5))


@pytest.mark.parametrize("name", sorted(WAYS.keys() - {"library"}))
def test_symbols_that_a_model_does_not_have_are_refused(name: str) -> None:
    """Compiled loops would read beyond the table."""
    models = Models.from_counts(np.ones((2, 3), np.int64))
    for columns, counts, which in (([3], [1], [0]), ([-1], [1], [0]), ([0], [1], [2]), ([0], [2], [0])):
        with pytest.raises(InputError, match="do not have"):
            WAYS[name].writer().groups(np.array(columns), np.array(counts), np.array(which), models)
    with pytest.raises(InputError, match="do not have"):
        WAYS[name].writer().uniform(np.array([5]), np.array([5]))


def test_memory_of_any_layout_will_do() -> None:
    """Columns of a matrix, and numbers of other widths."""
    columns = np.arange(12, dtype=np.uint8).reshape(4, 3)[:, 1] % 3
    known = np.array([4], np.uint16), np.array([1], np.uint8), Models.from_counts(np.array([[1, 2, 3], [5, 1, 4]]))
    assert len({write(way, [Step(columns, "groups", known)]) for way in WAYS.values()}) == 1


ALONE = """
import sys
hidden = [name for name in sys.argv[3].split(",") if name]
sys.modules.update(dict.fromkeys(hidden))
import json
from pathlib import Path
from kvferry.codecs import entropy
from kvferry.recipe import compress, decompress
from tests.bitstream import golden
from tests.codecs.test_transform import drawn, make

print(entropy.coders().writer.__module__)
expected = json.loads((golden.DATA / "expected.json").read_text())
for name in golden.STREAMS:
    blob = (golden.DATA / f"{name}.kvf").read_bytes()
    assert golden.describe(decompress(blob)) == expected[name], name
mine = compress(drawn(make(), 40), "full|transform:64")
Path(sys.argv[2]).write_bytes(mine)
theirs = Path(sys.argv[1]).read_bytes()
assert mine == theirs
print(golden.digest(decompress(theirs)))
"""


@pytest.mark.parametrize(
    ("hidden", "coder"),
    [
        ("numba", "kvferry.codecs.range_library" if "library" in WAYS else "kvferry.codecs.range_coder"),
        ("numba,constriction", "kvferry.codecs.range_coder"),
    ],
)
def test_without_what_is_not_installed_streams_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str, coder: str
) -> None:
    """In a process that lacks packages: recorded streams decode, and ``transform:64`` gives and reads the same bytes.

    It is held against another new process: in this one MKL rounds otherwise, by what ran in it before.
    """
    (tmp_path / "made.profile").write_bytes(make().to_bytes())
    monkeypatch.setenv("KVFERRY_PROFILES", str(tmp_path))
    whole, lacking = tmp_path / "whole", tmp_path / "lacking"
    (_, digest) = _alone(whole, whole, "")
    assert _alone(whole, lacking, hidden) == [coder, digest]


def _alone(theirs: Path, mine: Path, hidden: str) -> list[str]:
    """What a process without the ``hidden`` packages says; it writes its stream to ``mine``."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(theirs), str(mine), hidden],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_the_compiled_loops_are_taken_where_they_are() -> None:
    """No writer of another kind, whatever else is installed."""
    pytest.importorskip("numba")
    from kvferry.codecs import range_kernels

    assert entropy.Encoder()._coder._encode is range_kernels.encode  # type: ignore[union-attr]
    assert entropy.Decoder(b"")._coder._decode is range_kernels.decode  # type: ignore[union-attr]
