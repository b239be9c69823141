"""A shipped testbed model says once that it never saw such a picture, and never says it of a drawn scene."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kvferry
from kvferry import VLM
from kvferry.edge import Edge
from kvferry.errors import UnfamiliarPictureWarning
from kvferry.pictures import familiar
from kvferry.pictures.familiar import FILE, TrainingPictures, note_on
from kvferry.testbed.build import SIZES, build_model, write_folder
from kvferry.testbed.data import PAIR_SIDES, SIDES
from kvferry.testbed.data import samples as drawn
from tests.crossing.process import COMMAND, ENVIRONMENT, CloudProcess

SHIPPED = Path("testbed/edge")


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been said in this process."""
    monkeypatch.setattr(familiar, "_said", set())


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return kvferry.load("testbed/edge")


def test_what_a_folder_says_is_what_was_drawn(tmp_path: Path) -> None:
    for name in ("edge", "cloud", "control"):
        said = TrainingPictures.of(Path("testbed") / name)
        assert said is not None
        assert set(said.sides) == {*SIDES, *PAIR_SIDES}
    write_folder(build_model(SIZES["edge"]), tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == json.loads((SHIPPED / FILE).read_text())
    assert TrainingPictures.of(Path("tests")) is None


def test_never_of_a_drawn_scene(vlm: VLM) -> None:
    # every scene of every split has sides from this list, whatever its seed; forty are drawn to see it
    assert all(note_on(vlm, [x.size for x in sample.images]) == "" for sample in drawn("test", 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlm.prefill(next(iter(drawn("test", 1))).images, "how many shapes are there?")


def test_once_of_a_photograph(vlm: VLM) -> None:
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    with pytest.warns(UnfamiliarPictureWarning, match=r"testbed/edge was trained on drawn scenes .* 400 x 300"):
        vlm.prefill(photograph, "what is it?")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlm.look(photograph)
    grown = VLM(vlm.model, vlm.tokenizer, image_processor=vlm.image_processor)
    assert note_on(grown, [photograph.size]) == ""


def test_on_the_edge_too_where_the_model_is_in_the_cloud(tmp_path: Path) -> None:
    path = tmp_path / "photograph.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(path)
    with CloudProcess(SHIPPED) as cloud:
        with Edge(None, cloud.address, deadline=100) as edge, pytest.warns(UnfamiliarPictureWarning, match="400 x 300"):
            edge.ask(path, "what is it?", mode="image")
        words = [*COMMAND, "ask", str(path), "what is it?", "--cloud", cloud.address, "--mode", "image"]
        done = subprocess.run([*words, "--follow", "and now?"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0
    assert done.stderr.count("was trained on drawn scenes") == 1
    assert "Warning" not in done.stderr
    assert "trained on" not in done.stdout
    assert sys.executable not in done.stderr
