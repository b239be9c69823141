"""Points measured through the modes' own two halves, and how they reach a policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import kvferry
from kvferry import VLM, InputError
from kvferry.fit.points import Case, measure, usual_modes
from kvferry.policy import OperatingPoint, PointTable, read_points, write_points
from tests.cli.test_commands import Ran, refused, run
from tests.crossing.process import CloudProcess, write_model, write_picture

__all__ = ["run"]
QUESTIONS = ("what colour is the circle?", "how many shapes are there?")
MODES = ("image", "image:30", "kv:full|bf16", "kv:knorm@0.1|int4", "embeds:bf16", "scout:knorm@0.5", "local")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "cloud")


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    return kvferry.load(str(folder))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    picture = write_picture(tmp_path_factory.mktemp("picture") / "scene.png")
    return [Case([picture], question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def points(vlm: VLM, cases: list[Case]) -> dict[tuple[str, bool], OperatingPoint]:
    return {(x.mode, "held_picture" in x.needs): x for x in measure(vlm, vlm, MODES, cases)}


def test_points(points: dict[tuple[str, bool], OperatingPoint], vlm: VLM, cases: list[Case]) -> None:
    assert {mode for mode, held in points if not held} == set(MODES)
    assert {mode for mode, held in points if held} == {"image", "image:30", "scout:knorm@0.5"}
    for same in ("image", "kv:full|bf16", "embeds:bf16", "local"):
        assert points[same, False].quality == 1, "no answers are known, so agreement with the full cache counts"
    file = cases[0].images[0].stat().st_size
    assert file < points["image", False].nbytes < file + 200
    assert points["image", True].nbytes < 100
    for recipe in ("full|bf16", "knorm@0.1|int4"):
        prefilled = [vlm.prefill(x.images, x.question, recipe=recipe) for x in cases]
        streams = sum(len(kvferry.compress(x, recipe)) for x in prefilled) / len(cases)
        assert streams < points[f"kv:{recipe}", False].nbytes < streams + 300 + streams / 1000
    for point in points.values():
        assert point.n == len(cases)
        assert point.interval[0] <= point.quality <= point.interval[1]
        assert point.is_local or point.cloud_seconds > 0
        assert (point.prefill_seconds > 0) == point.prefills
    assert points["local", False].edge_seconds > 0
    assert points["kv:full|bf16", False].edge_seconds > points["image", False].edge_seconds
    needs = {mode: point.needs for (mode, held), point in points.items() if not held}
    assert needs["image"] == needs["scout:knorm@0.5"] == ("pixels",)
    assert (needs["embeds:bf16"], needs["kv:full|bf16"], needs["local"]) == (("embeds",), (), ())


def test_known_answers_count(vlm: VLM, cases: list[Case]) -> None:
    wrong = [Case(case.images, case.question, ("never said",)) for case in cases]
    (point,) = measure(vlm, vlm, ["kv:full|bf16"], wrong)
    assert (point.quality, point.interval[0]) == (0, 0)
    assert point.interval[1] > 0.5, "two questions tell little"
    with pytest.raises(InputError, match="--n"):
        list(measure(vlm, vlm, ["local"], []))


def test_parts_of_a_cache_in_tiers(vlm: VLM, cases: list[Case]) -> None:
    one, eight = (next(measure(vlm, vlm, ["kv:full|bf16"], cases, tiers)) for tiers in (1, 8))
    assert (one.tiers, one.anytime) == (1, ())
    assert eight.tiers == 8
    assert eight.quality == 1
    assert eight.nbytes > one.nbytes
    shares = [share for share, _ in eight.anytime]
    assert 0.1 < shares[0] < 0.4, "an eighth of the tokens, and headers"
    assert shares[-1] == 0.9
    (image,) = (x for x in measure(vlm, vlm, ["image"], cases, 8) if "held_picture" not in x.needs)
    assert (image.tiers, image.anytime) == (1, ())


def test_files(points: dict[tuple[str, bool], OperatingPoint], tmp_path: Path) -> None:
    table = PointTable("mine", tuple(points.values()), "measured")
    write_points((table,), tmp_path / "points.json")
    assert read_points(tmp_path / "points.json") == (table,)
    with pytest.raises(InputError, match="each mode once"):
        PointTable("twice", (points["image", True], points["image", True]))
    with pytest.raises(InputError, match="interval"):
        OperatingPoint("image", 0.5, 1, interval=(0.6, 0.7))


def test_usual_modes(vlm: VLM, tmp_path: Path) -> None:
    modes = usual_modes(vlm, vlm)
    assert {"image", "image:30", "kv:full|int4", "kv:leaveout@0.1|int4", "embeds:int4", "local"} <= set(modes)
    other = kvferry.load(str(write_model(tmp_path / "other", seed=1)))
    assert {x.partition(":")[0] for x in usual_modes(other, vlm)} == {"image", "scout", "local"}


def test_from_profile_to_answer(run: Ran, folder: Path, tmp_path: Path) -> None:
    """The two commands, one after the other, as docs/policy.md shows them."""
    Image.new("RGB", (192, 192), "red").save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"images": ["a.png"], "question": QUESTIONS[0]}) + "\n")
    points = tmp_path / "points.json"
    words = ["--edge", folder, "--cloud", folder, "--data", tmp_path / "q.jsonl", "--out", points]
    code, out, err = run("profile", *words, "--mode", "image", "--mode", "kv:full|int4", "--mode", "local")
    assert code == 0, err
    assert "kv:full|int4" in out
    (table,) = read_points(points)
    assert "kvferry profile" in table.source
    assert "1 questions of q.jsonl" in table.source
    assert "test split" in refused(run("profile", "--split", "test"))
    with CloudProcess(folder) as cloud:
        ask = ["ask", tmp_path / "a.png", QUESTIONS[0], "--cloud", cloud.address, "--model", folder]
        auto = [*ask, "--mode", "auto", "--points", points, "--policy", "greedy", "--explain"]
        code, out, err = run(*auto, "--no-pixels", "--json")
        assert code == 0, err
        answer = json.loads(out)
        assert answer["mode"] in ("kv", "local")
        assert "not allowed (no-pixels" in answer["why"]
        code, _, err = run(*auto)
        assert code == 0
        assert "by Greedy" in err
        assert "Mbit/s foretold" in err
        assert "go together" in refused(run(*ask, "--mode", "auto"))
        assert "--mode auto" in refused(run(*ask, "--explain"))
