"""Every mode on the shipped models, between two processes: its answer, its bytes, and whom it refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kvferry
from kvferry import VLM, Edge, FingerprintError, InputError, RecipeError
from kvferry.models.load import find_folder
from kvferry.modes import MODES, parse_mode
from kvferry.modes.masked import flatten
from kvferry.modes.ranking import kept_visual, selection_of
from kvferry.recipe import Recipe
from kvferry.selection import evict
from kvferry.testbed import Sample, samples
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"


@pytest.fixture(scope="module", autouse=True)
def shipped() -> Iterator[CloudProcess]:
    with CloudProcess(Path("testbed/cloud")) as process:
        yield process


@pytest.fixture(scope="module")
def large() -> VLM:
    return kvferry.load("testbed/cloud")


@pytest.fixture(scope="module")
def small() -> VLM:
    return kvferry.load("testbed/edge")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[Path], Sample]]:
    """Questions with their pictures as files without loss; the second is about two pictures."""
    folder = tmp_path_factory.mktemp("asked")
    found = []
    for sample in (*samples("validation", 3, start=300), *samples("validation", 1, kinds=["pair"])):
        paths = [folder / f"{sample.index}-{sample.kind}-{i}.png" for i in range(len(sample.images))]
        for path, image in zip(paths, sample.images, strict=True):
            image.save(path)
        found.append((paths, sample))
    return found


def test_embeddings_answer_as_the_picture_does(
    shipped: CloudProcess, large: VLM, asked: list[tuple[list[Path], Sample]]
) -> None:
    with Edge(large, shipped.address, deadline=100) as edge:
        for paths, sample in asked:
            picture = edge.ask(paths, sample.question, mode="image")
            sizes = []
            for mode in ("embeds", "embeds:int8"):
                answer = edge.ask(paths, sample.question, mode=mode)
                assert answer.text == picture.text
                assert (answer.mode, answer.recipe) == ("embeds", "int8" if "int8" in mode else "bf16")
                assert answer.cloud.prefill > 0
                sizes.append(answer.bitstream_bytes)
            tokens = sum(len(seen.embeds) for seen in large.look(paths))
            assert sizes[1] < 1.05 * 192 * tokens < sizes[0] < 2 * 192 * tokens


def test_embeddings_are_those_of_a_prefill(large: VLM, asked: list[tuple[list[Path], Sample]]) -> None:
    for paths, sample in asked:
        whole, split = large.prefill(paths, sample.question), large.prefill(large.look(paths), sample.question)
        assert torch.equal(whole.next_logits, split.next_logits)
        np.testing.assert_array_equal(whole.cache.layout.positions, split.cache.layout.positions)
        assert whole.cache.layout.rope_delta == split.cache.layout.rope_delta


def test_embeddings_of_another_tower_are_refused(shipped: CloudProcess, small: VLM, large: VLM) -> None:
    image = Image.new("RGB", (192, 192))
    with Edge(small, shipped.address) as edge, pytest.raises(FingerprintError, match="vision tower"):
        edge.ask([image], QUESTION, mode="embeds")
    seen = large.look([image])
    with pytest.raises(InputError, match="do not mix"):
        large.prefill([*seen, image], QUESTION)
    with pytest.raises(InputError, match="shape"):
        small.prefill(seen, QUESTION)


def test_scout(shipped: CloudProcess, small: VLM, large: VLM, asked: list[tuple[list[Path], Sample]]) -> None:
    """What the cloud's model says on the tokens that the edge's model found, and what that costs."""
    with Edge(small, shipped.address, deadline=100) as edge:
        for paths, sample in asked:
            ranking = Recipe.parse("vlcache@0.25")
            mask = kept_visual(small.prefill(paths, sample.question, recipe=ranking), ranking)
            whole = large.prefill(paths, sample.question)
            here = large.answer(evict(whole.cache, selection_of(whole, mask)))
            first, again = (edge.ask(paths, sample.question, mode="scout:vlcache@0.25") for _ in range(2))
            assert first.text == again.text == here
            assert (first.mode, first.recipe) == ("scout", "vlcache@0.25")
            positions = first.bitstream_bytes - sum(path.stat().st_size for path in paths)
            assert positions <= len(mask) / 8 + 19
            assert positions < 2 * mask.sum()
            assert again.bitstream_bytes < positions  # no picture, and no change
            assert abs(int(mask.sum()) - 0.25 * len(mask)) <= 0.5


def test_scout_sends_changes(shipped: CloudProcess, small: VLM, asked: list[tuple[list[Path], Sample]]) -> None:
    paths, _ = asked[0]
    with Edge(small, shipped.address, deadline=100) as edge:
        edge.ask(paths, QUESTION, mode="scout")
        with Edge(small, shipped.address, deadline=100) as fresh:
            for question in ("what colour is the square?", "how many shapes are there?"):
                later, whole = (one.ask(paths, question, mode="scout") for one in (edge, fresh))
                assert later.text == whole.text
                assert later.bitstream_bytes < 100


def test_scout_refuses_another_grid(shipped: CloudProcess, tmp_path: Path) -> None:
    folder = shutil.copytree(find_folder("testbed/edge"), tmp_path / "edge")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"]["shortest_edge"] *= 2
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with Edge(kvferry.load(folder), shipped.address) as edge, pytest.raises(FingerprintError, match="patch grid"):
        edge.ask([Image.new("RGB", (192, 192))], QUESTION, mode="scout")


def test_pictures_as_smaller_files(
    shipped: CloudProcess, small: VLM, large: VLM, asked: list[tuple[list[Path], Sample]]
) -> None:
    paths, sample = asked[0]
    with Edge(small, shipped.address, deadline=100) as edge:
        ways = ("image:90", "image:60", "image:60,mask=0.25")
        plain, smaller, masked = (edge.ask(paths, sample.question, mode=mode) for mode in ways)
        assert plain.bitstream_bytes > smaller.bitstream_bytes > masked.bitstream_bytes
        assert (masked.mode, masked.recipe) == ("image", "60,mask=0.25")
        out = io.BytesIO()
        Image.open(paths[0]).save(out, "JPEG", quality=60)
        assert smaller.bitstream_bytes == len(out.getvalue())
        assert smaller.text == large.answer(large.prefill([Image.open(out)], sample.question).cache)
        again = edge.ask(paths, sample.question, mode="image:60")
        assert (again.bitstream_bytes, again.text) == (0, smaller.text)


def test_flattened_pictures_keep_what_was_asked_for() -> None:
    """A picture that does not divide into its tokens: every pixel that a kept token touches stays."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    mask = np.zeros(3 * 4, np.bool_)
    mask[[0, 6]] = True
    (flat,) = flatten([Image.fromarray(pixels)], mask, [(1, 3, 4)])
    same = (np.asarray(flat) == pixels).all(-1)
    assert same[:17, :18].all()
    assert same[16:34, 35:53].all()
    assert same.mean() < 0.2
    assert len(np.unique(np.asarray(flat)[~same], axis=0)) == 1
    with pytest.raises(kvferry.UnsupportedModelError, match="mask"):
        flatten([flat], mask, [])


def test_words_only(shipped: CloudProcess, large: VLM) -> None:
    with Edge(None, shipped.address) as edge:
        answer = edge.ask([], QUESTION, mode="prompt")
        assert answer.text == large.answer(large.prefill((), QUESTION).cache)
        assert (answer.mode, answer.bitstream_bytes) == ("prompt", 0)
        with pytest.raises(InputError, match="pictures out"):
            edge.ask([Image.new("RGB", (192, 192))], QUESTION, mode="prompt")


def test_nothing_crosses(small: VLM, asked: list[tuple[list[Path], Sample]]) -> None:
    """There is no cloud at this address."""
    paths, sample = asked[0]
    with Edge(small, "127.0.0.1:9", uplink="1mbit") as edge:
        said: list[str] = []
        answer = edge.ask(paths, sample.question, mode="local", on_token=lambda _, text: said.append(text))
        assert answer.text == small.answer(small.prefill(paths, sample.question).cache) == "".join(said)
        assert (answer.mode, answer.payload_bytes_up, answer.wire_bytes_up) == ("local", 0, None)
        assert 0 < answer.seconds.first_token <= answer.seconds.total
        assert answer.why_local == ""


@pytest.mark.parametrize(
    "text",
    [
        "kv:snapkv@0.5|int8|zstd", "image", "image:60", "image:mask=0.5", "image:60,mask=0.25", "embeds:bf16",
        "embeds:int4", "scout:keydiff@0.5", "scout:snapkv@0.1,window=16", "prompt", "local",
    ],
)  # fmt: skip
def test_a_mode_reads_back(text: str) -> None:
    mode = parse_mode(text)
    assert str(mode).removesuffix(":") == text
    assert parse_mode(str(mode)) == mode


def test_default_options() -> None:
    assert {str(parse_mode(name)) for name in MODES} == {
        "kv:leaveout@0.25|int8|zstd", "image", "embeds:bf16", "scout:vlcache@0.25", "prompt", "local",
        "translate:full|int8|zstd",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("telepathy", InputError, "choose from"),
        ("image:120", InputError, "1 to 95"),
        ("image:good", RecipeError, "quality"),
        ("image:60,mask=0", InputError, "mask"),
        ("embeds:int9", RecipeError, "codec"),
        ("scout:full", RecipeError, "fraction"),
        ("scout:q2c@0.25|int4", RecipeError, "no codec"),
        ("scout:q2c@0.25,budget=pyramid", RecipeError, "budget"),
        ("prompt:60", InputError, "no options"),
        ("local:60", InputError, "no options"),
    ],
)
def test_no_such_mode(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_mode(text)


@pytest.mark.parametrize("mode", ["embeds", "scout", "local", "image:60,mask=0.5"])
def test_modes_that_need_a_model(shipped: CloudProcess, mode: str) -> None:
    with Edge(None, shipped.address) as edge, pytest.raises(InputError, match="model"):
        edge.ask([Image.new("RGB", (192, 192))], QUESTION, mode=mode)


def test_only_a_cache_ships_first(shipped: CloudProcess, small: VLM) -> None:
    with Edge(small, shipped.address) as edge, pytest.raises(InputError, match="ship_first"):
        edge.ask([], QUESTION, mode="image", ship_first=True)
