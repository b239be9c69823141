"""The testbed's questions in ordinary English: wording varies, answers are words as people write them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np

from kvferry.testbed import words
from kvferry.testbed.questions import KINDS as TESTBED_KINDS
from kvferry.testbed.questions import Question
from kvferry.testbed.scenes import Scene, Thing

KINDS: tuple[str, ...] = (*TESTBED_KINDS, "caption", "text")
"""The testbed's kinds, a sentence about all shapes, and a question without any picture."""

MOST_IN_CAPTION = 4
_APART = 6.0
"""Pixels between two things' centres from left to right, at least, for a caption to have one order."""

_COLOUR = ("colour", "color")

_WORDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"what colour is (?P<x>.+)\?",
        ("What {c} is {x}?", "What is the {c} of {x}?", "Which {c} does {x} have?", "Name the {c} of {x}."),
    ),
    (
        r"what shape is (?P<x>\w+)\?",
        ("Which shape is {x}?", "What shape is {x}?", "What is the {x} shape?", "Name the shape that is {x}."),
    ),
    (
        r"what shape has (?P<x>\w+) on it\?",
        ("What shape has {x} on it?", "Which shape says {x}?", "On which shape is {x} written?"),
    ),
    (
        r"what (?P<k>digit|letter|number) is on the shape (?P<p>left|right) of (?P<x>.+)\?",
        (
            "What {k} is on the shape to the {p} of {x}?", "Which {k} does the shape {p} of {x} show?",
            "Read the {k} on the shape just {p} of {x}.",
        ),
    ),
    (
        r"what (?P<k>digit|letter|number) is on (?P<x>.+)\?",
        ("What {k} is on {x}?", "Which {k} do you see on {x}?", "Read the {k} on {x}.", "{x} shows which {k}?"),
    ),
    (
        r"what word is written in (?P<x>\w+)\?",
        ("What word is written in {x}?", "Read the {x} word.", "What does the {x} writing say?"),
    ),
    (r"what word is written\?", ("What word is written?", "Which word can you read?", "What does the writing say?")),
    (
        r"how many (?P<x>.+) are there\?",
        ("How many {x} are there?", "Count the {x}.", "How many {x} can you see?", "What is the number of {x}?"),
    ),
    (
        r"is there an? (?P<x>.+)\?",
        ("Is there {a} {x}?", "Can you see {a} {x}?", "Does the picture show {a} {x}?", "Do you see any {x}?"),
    ),
    (
        r"what is (?P<p>left|right) of (?P<x>.+)\?",
        ("What is to the {p} of {x}?", "What is just {p} of {x}?", "Which shape is {p} of {x}?"),
    ),
    (
        r"what is the (?P<x>largest|smallest) shape\?",
        ("What is the {x} shape?", "Which shape is the {x}?", "Describe the {x} shape."),
    ),
)  # fmt: skip
_NOTE = re.compile(r"note: (?P<facts>.+)\. what has (?P<who>\w+)\?")
_FACT = re.compile(r"(\w+) has (\w+)")
_NOTE_WORDINGS = ("What does {who} have?", "What did {who} get?", "Tell me what {who} has.", "{who} has what?")
_PAIR = re.compile(r"in the (?P<which>first|second) picture, (?P<rest>.+)")
_PAIR_WORDINGS = ("In the {which} picture: {rest}", "Look at the {which} picture. {rest}", "{rest} ({which} picture)")
_CAPTION_WORDINGS = (
    "Describe the shapes from left to right.", "Say what is there, from left to right.",
    "List every shape, left to right.", "Write a caption for the shapes, from left to right.",
)  # fmt: skip

_INVENTORY_WORDINGS = (
    "How many are there of each {x}?", "Count the shapes of each {x}.", "Take stock by {x}.",
)  # fmt: skip


def article(noun: str) -> str:
    """ "a" or "an"."""
    return "an" if noun[0] in "aeiou" else "a"


def written(glyph: str) -> str:
    """A glyph as it is drawn: letters are capitals."""
    return glyph.upper()


def _join_spelled(text: str) -> str:
    """ "with 4 7 on it" is "with 47 on it" again, and letters are capitals."""
    return re.sub(r"(?<=with |.has )(\w(?: \w)*)(?= on it)", lambda found: found[0].replace(" ", "").upper(), text)


def _worded(rng: np.random.Generator, text: str) -> str:
    for pattern, wordings in _WORDINGS:
        if found := re.fullmatch(pattern, _join_spelled(text)):
            slots = found.groupdict()
            slots |= {"c": str(rng.choice(_COLOUR)), "a": article(slots.get("x") or "a")}
            said = str(rng.choice(wordings)).format(**slots)
            return said[0].upper() + said[1:]
    raise ValueError(f"no wording for {text!r}")


def _note(rng: np.random.Generator, text: str) -> str:
    found = _NOTE.fullmatch(text)
    if found is None:
        raise ValueError(f"not a note: {text!r}")
    facts = [f"{name.capitalize()} has {_thing(value)}" for name, value in _FACT.findall(found["facts"])]
    listed = ", ".join(facts[:-1]) + f" and {facts[-1]}" if len(facts) > 1 else facts[0]
    return f"{listed}. {rng.choice(_NOTE_WORDINGS)}".format(who=found["who"].capitalize())


def _thing(value: str) -> str:
    """What somebody has: the number 4, a star, the colour red."""
    if value.isdigit():
        return f"the number {value}"
    return f"{article(value)} {value}" if value in words.ALL_SHAPES else f"the colour {value}"


def _answer(question: Question, scene: Scene) -> str:
    kind, said = question.kind, question.answer
    if kind in ("glyph", "number", "two_hop", "word", "pair"):
        joined = said.replace(" ", "") if re.fullmatch(r"\w( \w)*", said) else said
        return joined if kind == "word" else written(joined) if len(joined) <= 2 else joined
    return f"{article(said)} {said}" if kind in ("relation", "compare") else said


def in_english(rng: np.random.Generator, question: Question, scene: Scene) -> Question:
    """The same question and answer in one of several wordings."""
    answer = _answer(question, scene)
    if question.kind == "lookup":
        return replace(question, text=_note(rng, question.text), answer=answer)
    if found := _PAIR.fullmatch(question.text):
        rest = _worded(rng, found["rest"])
        text = str(rng.choice(_PAIR_WORDINGS)).format(which=found["which"], rest=rest)
        return replace(question, text=text, answer=answer)
    return replace(question, text=_worded(rng, question.text), answer=answer)


def _described(thing: Thing) -> str:
    name = f"{article(thing.name)} {thing.name}"
    return f"{name} with {written(thing.glyph)}" if thing.glyph else name


def caption(rng: np.random.Generator, scene: Scene, most: int = MOST_IN_CAPTION) -> Question | None:
    """ "A red square with 3, a blue star and an orange cross with 47."

    None where left to right is a matter of opinion, or there are too many shapes for a sentence.
    """
    order = sorted(range(len(scene.things)), key=lambda index: scene.things[index].x)
    xs = [scene.things[index].x for index in order]
    close = any(right - left < _APART for left, right in pairwise(xs))
    if not 2 <= len(order) <= most or close:
        return None
    parts = [_described(scene.things[index]) for index in order]
    said = ", ".join(parts[:-1]) + f" and {parts[-1]}."
    which = tuple(range(len(order)))
    return Question(str(rng.choice(_CAPTION_WORDINGS)), said[0].upper() + said[1:], "caption", which, which)


def inventory(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "circle 2, star 1.", or by colour; None where everything is alike. Only taught: it is many counts in one."""
    by_colour = bool(rng.random() < 0.5)
    counts = Counter(thing.colour if by_colour else thing.shape for thing in scene.things)
    if len(counts) < 2:
        return None
    names = words.ALL_COLOURS if by_colour else words.ALL_SHAPES
    said = ", ".join(f"{name} {counts[name]}" for name in names if counts[name]) + "."
    which = tuple(range(len(scene.things)))
    asked = str(rng.choice(_INVENTORY_WORDINGS)).format(x="colour" if by_colour else "shape")
    return Question(asked, said, "inventory", which, which)


MAKERS: dict[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "caption": caption, "inventory": inventory,
}  # fmt: skip
"""Kinds of question that the testbed does not have."""
