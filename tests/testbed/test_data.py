"""The generator: the same again from the same seed, splits apart, answers true."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from kvferry.testbed import KINDS, exact_match, sample, samples
from kvferry.testbed.data import SIDES, SPLITS
from kvferry.testbed.questions import majority
from kvferry.testbed.render import cover_map, render
from kvferry.testbed.scenes import Scene, Thing, neighbour
from kvferry.testbed.words import ALL_SHAPES, SINGULAR


def test_same_seed_same_sample() -> None:
    for kind in ("glyph", "pair"):
        first, again = sample("test", 3, kinds=[kind]), sample("test", 3, kinds=[kind])
        assert (first.question, first.answer, first.scenes) == (again.question, again.answer, again.scenes)
        assert all(
            np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first.images, again.images, strict=True)
        )


def test_splits_share_no_scene() -> None:
    seen = Counter(scene for split in SPLITS for drawn in samples(split, 39) for scene in drawn.scenes)
    assert max(seen.values()) == 1
    assert len(set(SPLITS.values())) == len(SPLITS)


def test_starting_later_gives_the_same_samples() -> None:
    late = list(samples("train", 3, start=5))
    assert [drawn.question for drawn in late] == [d.question for d in list(samples("train", 8))[5:]]


def test_kinds_take_turns() -> None:
    assert [drawn.kind for drawn in samples("validation", len(KINDS))] == list(KINDS)


def _named(scene: Scene, name: str) -> list[Thing]:
    """The things that "red circle", "circle", "red shape" or "shapes" may mean."""
    said = [SINGULAR.get(word, word) for word in name.split()]
    return [
        thing
        for thing in scene.things
        if all(word in (thing.colour, thing.shape, "shape", "shapes") or word in ("shape", "shapes") for word in said)
    ]


def _one(scene: Scene, name: str) -> Thing:
    (thing,) = _named(scene, name)
    return thing


def _expected(question: str, scenes: tuple[Scene, ...]) -> str | None:
    """Answer a question from the scene by reading the words, with nothing of the generator's own bookkeeping."""
    scene = scenes[0]
    if match := re.fullmatch(r"in the (first|second) picture, (.*)", question):
        return _expected(match[2], (scenes[match[1] == "second"],))
    if match := re.fullmatch(r"what (colour|shape) (?:is the shape with|has) (.+?) on it\?", question):
        (thing,) = [t for t in scene.things if t.glyph == match[2].replace(" ", "")]
        return str(getattr(thing, match[1]))
    if match := re.fullmatch(r"what colour is the (\w+)\?", question):
        return _one(scene, match[1]).colour
    if match := re.fullmatch(r"what shape is (\w+)\?", question):
        return _one(scene, match[1]).shape
    if match := re.fullmatch(r"what \w+ is on the shape (left|right) of the (.+)\?", question):
        other = neighbour(scene, scene.things.index(_one(scene, match[2])), match[1])
        return None if other is None else scene.things[other].glyph
    if match := re.fullmatch(r"what (?:digit|letter|number) is on the (.+)\?", question):
        return _one(scene, match[1]).glyph
    if match := re.fullmatch(r"what is (left|right) of the (.+)\?", question):
        other = neighbour(scene, scene.things.index(_one(scene, match[2])), match[1])
        return None if other is None else scene.things[other].name
    if match := re.fullmatch(r"what is the (largest|smallest) shape\?", question):
        order = sorted(scene.things, key=lambda thing: thing.diameter, reverse=match[1] == "largest")
        assert order[0].level != order[1].level
        return order[0].name
    if match := re.fullmatch(r"how many (.+) are there\?", question):
        return str(len(_named(scene, match[1])))
    if match := re.fullmatch(r"is there a (.+)\?", question):
        return "yes" if _named(scene, match[1]) else "no"
    if match := re.fullmatch(r"what word is written(?: in (\w+))?\?", question):
        (sign,) = [sign for sign in scene.signs if match[1] in (None, sign.colour)]
        return sign.word
    if match := re.fullmatch(r"note: (.+)\. what has (\w+)\?", question):
        return dict(part.split(" has ") for part in match[1].split(", "))[match[2]]
    raise AssertionError(f"no reading of {question!r}")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true(kind: str) -> None:
    for drawn in samples("calibration", 25, kinds=[kind]):
        expected = _expected(drawn.question, drawn.scenes)
        assert expected is not None
        assert exact_match(expected, drawn.answer), drawn


def test_guessing_is_poor() -> None:
    for kind in KINDS:
        answers = [drawn.answer for drawn in samples("validation", 100, kinds=[kind])]
        assert majority(answers) < (0.7 if kind == "exist" else 0.5), kind


def test_evidence_boxes_lie_in_their_pictures() -> None:
    for drawn in samples("validation", 39):
        assert bool(drawn.evidence_boxes) or drawn.kind in ("lookup", "exist", "count")
        for picture, x0, y0, x1, y1 in drawn.evidence_boxes:
            width, height = drawn.images[picture].size
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height


def test_pictures_have_144_to_256_tokens_and_things_stay_visible() -> None:
    for drawn in samples("validation", 39):
        for scene, image in zip(drawn.scenes, drawn.images, strict=True):
            assert image.size == (scene.width, scene.height)
            assert 144 <= scene.width * scene.height // 256 <= 256
            assert {scene.width, scene.height} <= set(SIDES)
            cover = cover_map(scene)
            assert all((cover == i + 1).sum() > 150 for i in range(len(scene.things)))


def test_every_shape_can_be_drawn() -> None:
    places = [(40.0 + 60 * (i % 3), 40.0 + 60 * (i // 3)) for i in range(len(ALL_SHAPES))]
    things = tuple(Thing("pink", shape, "7", x, y, 42, 1) for shape, (x, y) in zip(ALL_SHAPES, places, strict=True))
    assert render(Scene(192, 224, things, (), 0)).size == (192, 224)


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        sample("holdout", 0)
    with pytest.raises(ValueError, match="unknown kind"):
        sample("test", 0, kinds=["riddle"])
    with pytest.raises(ValueError, match="starts at 0"):
        sample("test", -1)


@pytest.mark.parametrize(("said", "answer", "same"), [("4 7", "47", True), ("Red", "red", True), ("4", "47", False)])
def test_exact_match(said: str, answer: str, same: bool) -> None:
    assert exact_match(said, answer) is same
