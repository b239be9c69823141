"""Mode translate between two processes with two different models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvferry
from kvferry import VLM, Edge, FingerprintError, InputError, RecipeError
from kvferry.models.steps import Pace, finished
from kvferry.models.translated import read_on
from kvferry.modes import parse_mode
from kvferry.modes.translate import shared_part, visual_part
from kvferry.recipe import Recipe, compress, decompress
from kvferry.translator import read
from tests.crossing.cutter import Cutter
from tests.crossing.process import CloudProcess
from tests.translate.conftest import identity, random_translator

QUESTION = "what colour is the circle?"
FULL = "translate:full|bf16"


@pytest.fixture(scope="module")
def file(small: VLM, large: VLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "small.translator"
    path.write_bytes(random_translator(small, large).to_bytes())
    return path


@pytest.fixture(scope="module")
def cloud(large_folder: Path, large: VLM, file: Path) -> Iterator[CloudProcess]:
    own = file.with_name("own.translator")
    own.write_bytes(identity(large).to_bytes())
    options = ("--dtype", "float32", "--translator", str(file), "--translator", str(own))
    with CloudProcess(large_folder, *options) as process:
        yield process
        assert process.stop() == 0


def expected(
    small: VLM, large: VLM, file: Path, picture: Path, recipe: str, asked: str | None = None, **options: int
) -> str:
    """What the cloud must say, made here from the translator's file and the two models."""
    prefilled = small.prefill([picture], None if asked else QUESTION, recipe=recipe)
    arrived = decompress(
        compress(visual_part(Recipe.parse(recipe).keep(prefilled))[0], f"full|{recipe.split('|', 1)[1]}")
    )
    index = arrived.layers[0].positions[0]
    pairs = read(file)(arrived.layers, arrived.layout, large.rotary, index)
    cache = finished(read_on(large, arrived.layout, arrived.length, pairs, index, Pace()))
    return large.answer(cache, asked, **options)


@pytest.mark.parametrize(
    "recipe", ["full|bf16", "full|int4|zstd", "knorm@0.3,budget=shared|int8", "full|int8"]
)  # fmt: skip
def test_the_large_model_answers_from_the_small_ones_cache(
    cloud: CloudProcess, small: VLM, large: VLM, file: Path, picture: Path, recipe: str
) -> None:
    with Edge(small, cloud.address, deadline=100) as edge:
        answer = edge.ask([picture], QUESTION, mode=f"translate:{recipe}", max_new_tokens=6)
        assert answer.text == expected(small, large, file, picture, recipe, max_new_tokens=6)
        assert (answer.mode, answer.recipe) == ("translate", recipe)
        assert answer.cloud.prefill > 0
        whole = edge.ask([picture], QUESTION, mode=FULL, max_new_tokens=6)
        assert answer.bitstream_bytes <= whole.bitstream_bytes
        tokens = 196 * 3 * 2 * 32 * 2
        assert tokens < whole.bitstream_bytes < 1.1 * tokens, "the picture's keys and values, and no others"


def test_an_identity_answers_as_the_model_itself(cloud: CloudProcess, large: VLM, picture: Path) -> None:
    with Edge(large, cloud.address, deadline=100) as edge:
        for question in (QUESTION, "how many shapes are there?"):
            options = {"question": question, "max_new_tokens": 6}
            wanted = edge.ask([picture], mode="image", **options)  # type: ignore[arg-type]
            assert edge.ask([picture], mode=FULL, **options).text == wanted.text  # type: ignore[arg-type]


def test_scenes_sessions_and_turns(cloud: CloudProcess, small: VLM, large: VLM, file: Path, picture: Path) -> None:
    """Protocol B: the second question crosses alone; turns go on from the translated cache."""
    with Edge(small, cloud.address, deadline=100) as edge:
        first = edge.ask([picture], QUESTION, mode=FULL, ship_first=True, max_new_tokens=6)
        assert first.text == expected(small, large, file, picture, "full|bf16", QUESTION, max_new_tokens=6)
        second = edge.ask([picture], "how many shapes are there?", mode=FULL, ship_first=True, max_new_tokens=6)
        assert second.bitstream_bytes == 0 < first.bitstream_bytes
        other = "how many shapes are there?"
        assert second.text == expected(small, large, file, picture, "full|bf16", other, max_new_tokens=6)
        talk = edge.conversation([picture], mode=FULL)
        talk.ask(QUESTION, max_new_tokens=3)
        assert talk.ask(other, max_new_tokens=3).bitstream_bytes == 0


def test_tiers_and_steps(cloud: CloudProcess, small: VLM, picture: Path) -> None:
    with Edge(small, cloud.address, deadline=100) as edge:
        plain = edge.ask([picture], QUESTION, mode=FULL, max_new_tokens=6)
        tiered = edge.ask([picture], QUESTION, mode=FULL, tiers=4, max_new_tokens=6)
        steps = edge.ask([picture], QUESTION, mode="translate:full|int2;full|bf16", max_new_tokens=6)
        assert plain.text == tiered.text == steps.text


def test_cut_while_sending(cloud: CloudProcess, small: VLM, picture: Path) -> None:
    """A broken call is resumed where it was: the stream is that of mode kv."""
    with Cutter(cloud.address) as cutter, Edge(small, cutter.address, deadline=100, hold=False) as edge:
        whole = edge.ask([picture], QUESTION, mode=FULL, max_new_tokens=6)
        cuts = [whole.bitstream_bytes // 4]

        def cut(acknowledged: int, _: int | None) -> None:
            if cuts and acknowledged >= cuts[0]:
                cuts.pop(0)
                cutter.cut()

        again = edge.ask([picture], QUESTION, mode=FULL, max_new_tokens=6, on_sent=cut)
        assert not cuts
        assert cutter.connections > 1
        assert again.text == whole.text


def test_words_alone_and_words_around_a_picture(cloud: CloudProcess, small: VLM, large: VLM, picture: Path) -> None:
    with Edge(small, cloud.address, deadline=100) as edge:
        wanted = large.answer(large.prefill([], QUESTION), max_new_tokens=6)
        assert edge.ask([], QUESTION, mode=FULL, max_new_tokens=6).text == wanted


def test_what_is_refused(cloud: CloudProcess, small: VLM, large: VLM, large_folder: Path, picture: Path) -> None:
    with Edge(small, cloud.address, deadline=100) as edge:
        with pytest.raises(InputError, match="budget=shared"):
            edge.ask([picture], QUESTION, mode="translate:knorm@0.3|int8")
        with pytest.raises(FingerprintError, match="was made by model"):
            edge.ask([picture], QUESTION, mode="kv:full|int8")
    stranger = Edge(kvferry.load("testbed/control"), cloud.address, deadline=100)
    with stranger, pytest.raises(FingerprintError, match=r"no translator from model .* --translator FILE"):
        stranger.ask([picture], QUESTION, mode=FULL)
    with Edge(None, cloud.address) as edge, pytest.raises(InputError, match="needs a model"):
        edge.ask([picture], QUESTION, mode=FULL)
    assert str(parse_mode("translate")) == "translate:full|int8|zstd"
    with pytest.raises(RecipeError):
        parse_mode("translate:nothing|int8")
    assert str(parse_mode("translate:full|int4")) == "translate:full|int4"


def test_a_stream_cut_short_holds_what_all_layers_have(small: VLM, picture: Path) -> None:
    cache = small.prefill([picture], QUESTION).cache
    whole, _ = visual_part(cache)
    layers = list(whole.layers)
    layers[1] = layers[1].take(torch.arange(50).expand(layers[1].heads, -1))
    layers[2] = layers[2].take(torch.arange(20, 196).expand(layers[2].heads, -1))
    cut = shared_part(kvferry.KVCache(tuple(layers), whole.layout, whole.length, whole.fingerprint))
    wanted = whole.layers[0].positions[:, 20:50]
    for mine, theirs in zip(cut, whole, strict=True):
        assert torch.equal(mine.positions, wanted)
        assert torch.equal(mine.keys, theirs.keys[:, 20:50])


def test_serve_refuses_a_file_for_another_model(small_folder: Path, file: Path) -> None:
    with CloudProcess(small_folder, "--translator", str(file)) as process:
        said, _ = process.process.communicate(timeout=60)
        assert process.process.returncode == 2
    assert "translates into model" in said
