"""Wording varies; the question stays the same."""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np
import pytest

from kvferry.testbed import words
from kvferry.testbed.questions import Question
from kvferry.testbed.scenes import Scene, Thing
from kvferry.testbed.smol.data import ask_in_english, draw
from kvferry.testbed.smol.english import KINDS, caption, in_english


def drawn(kind: str, n: int) -> list[tuple[list[Scene], Question]]:
    rng, found = np.random.default_rng(5), []
    while len(found) < n:
        scenes = [draw(rng, 192, 192, few=kind == "caption") for _ in range(1 + (kind == "pair"))]
        if question := ask_in_english(rng, scenes, kind):
            found.append((scenes, question))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_several_wordings_and_answers(kind: str) -> None:
    questions = [question for _, question in drawn(kind, 60)]
    listed = [words.ALL_COLOURS, words.ALL_SHAPES, words.ALL_SHAPES.values(), words.NAMES, words.DIRECTIONS]
    names = {name for names in listed for name in names} | {"color", "first", "second", "an", "largest", "smallest"}
    shapes_of_wording = set()
    for question in questions:
        spoken = (word for word in re.findall(r"\w+", question.text.lower()) if not re.fullmatch(r"\w|\d+", word))
        shapes_of_wording.add(" ".join("_" if word in names else word for word in spoken))
    assert len(shapes_of_wording) >= 2
    assert len({question.answer for question in questions}) >= 2
    for question in questions:
        assert question.text[0].isupper()
        assert not re.search(r"\b\w \w\b(?! )", question.answer), "letters are not spelled one by one"
        assert "{" not in question.text + question.answer


def test_a_wording_says_what_the_testbed_asked() -> None:
    scene = Scene(192, 192, (), (), 0)
    said = defaultdict(set)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        for text, answer, kind in (
            ("what colour is the shape with 4 7 on it?", "red", "colour"),
            ("what digit is on the shape left of the red circle?", "4", "two_hop"),
            ("what letter is on the red square?", "k", "glyph"),
            ("is there a orange star?", "yes", "exist"),
            ("note: tom has 4, ann has 5. what has ann?", "5", "lookup"),
            ("what word is written in blue?", "c a t", "word"),
            ("what is right of the star?", "orange heart", "relation"),
        ):
            question = in_english(rng, Question(text, answer, kind), scene)
            said[kind].add((question.text, question.answer))
    assert ("What color is the shape with 47 on it?", "red") in said["colour"]
    assert ("Read the digit on the shape just left of the red circle.", "4") in said["two_hop"]
    assert ("The red square shows which letter?", "K") in said["glyph"]
    assert ("Can you see an orange star?", "yes") in said["exist"]
    assert ("Tom has the number 4 and Ann has the number 5. What did Ann get?", "5") in said["lookup"]
    assert ("Read the blue word.", "cat") in said["word"]
    assert ("What is just right of the star?", "an orange heart") in said["relation"]
    with pytest.raises(ValueError, match="no wording"):
        in_english(np.random.default_rng(0), Question("why?", "because", "colour"), scene)


def thing(colour: str, shape: str, glyph: str, x: float) -> Thing:
    return Thing(colour, shape, glyph, x, 60, 30, 0)


def test_a_caption_names_all_from_left_to_right() -> None:
    row = (thing("blue", "star", "", 90), thing("red", "square", "47", 30), thing("orange", "cross", "k", 150))
    question = caption(np.random.default_rng(0), Scene(192, 192, row, (), 0))
    assert question is not None
    assert question.answer == "A red square with 47, a blue star and an orange cross with K."
    close = (row[0], thing("red", "square", "", 92))
    assert caption(np.random.default_rng(0), Scene(192, 192, close, (), 0)) is None


def test_an_inventory_counts_everything_once() -> None:
    seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scene = draw(rng, 192, 192)
        question = ask_in_english(rng, [scene], "inventory")
        if question is None:
            continue
        counts = dict(part.rsplit(" ", 1) for part in question.answer.removesuffix(".").split(", "))
        assert sum(map(int, counts.values())) == len(scene.things)
        kind = "colour" if "colour" in question.text else "shape"
        assert counts == {
            name: str(sum(getattr(thing, kind) == name for thing in scene.things)) for name in counts
        }  # fmt: skip
        seen.add(kind)
    assert seen == {"colour", "shape"}
