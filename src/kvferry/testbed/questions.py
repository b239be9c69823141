"""Questions about scenes: one small function per kind, each unambiguous by construction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from . import words
from .scenes import Scene, Thing, neighbour


@dataclass(frozen=True)
class Question:
    """A question, its answer, and what decides it.

    `named` are the things that the question speaks of, `decisive` those whose attributes make the answer, `signs` the
    signs that do; `picture` says which picture they are in.
    """

    text: str
    answer: str
    kind: str
    named: tuple[int, ...] = ()
    decisive: tuple[int, ...] = ()
    signs: tuple[int, ...] = ()
    picture: int = 0


T = TypeVar("T")
MOST_COUNTED = 4
"""The largest answer of a counting question."""

Maker = Callable[[np.random.Generator, Scene], Question | None]


def _pick(rng: np.random.Generator, options: list[T]) -> T | None:
    return options[int(rng.integers(len(options)))] if options else None


def _names(scene: Scene, index: int) -> list[str]:
    """All the ways to name one thing and no other: "red circle", "circle", "red shape"."""
    thing, things = scene.things[index], scene.things
    names = []
    if sum(other.name == thing.name for other in things) == 1:
        names += [thing.name, thing.name]
    if sum(other.shape == thing.shape for other in things) == 1:
        names.append(thing.shape)
    if sum(other.colour == thing.colour for other in things) == 1:
        names.append(f"{thing.colour} shape")
    return names


def _unique_glyph(scene: Scene, thing: Thing) -> bool:
    return bool(thing.glyph) and sum(other.glyph == thing.glyph for other in scene.things) == 1


def _glyph_kind(glyph: str) -> str:
    """What to call a glyph: "digit", "letter" or "number"; empty for none."""
    if not glyph:
        return ""
    return "number" if len(glyph) > 1 else "digit" if glyph.isdigit() else "letter"


def _spoken(text: str) -> str:
    """One token per character: "47" is said as "4 7", "cat" as "c a t"."""
    return " ".join(text)


def colour(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "what colour is the circle?" and "what colour is the shape with 7 on it?" """
    options = []
    for index, thing in enumerate(scene.things):
        if thing.shape in _names(scene, index):
            options.append((index, f"what colour is the {thing.shape}?"))
        if _unique_glyph(scene, thing):
            options.append((index, f"what colour is the shape with {_spoken(thing.glyph)} on it?"))
    chosen = _pick(rng, options)
    if chosen is None:
        return None
    index, text = chosen
    return Question(text, scene.things[index].colour, "colour", (index,), (index,))


def shape(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "what shape is red?" and "what shape has 7 on it?" """
    options = []
    for index, thing in enumerate(scene.things):
        if f"{thing.colour} shape" in _names(scene, index):
            options.append((index, f"what shape is {thing.colour}?"))
        if _unique_glyph(scene, thing):
            options.append((index, f"what shape has {_spoken(thing.glyph)} on it?"))
    chosen = _pick(rng, options)
    if chosen is None:
        return None
    index, text = chosen
    return Question(text, scene.things[index].shape, "shape", (index,), (index,))


def _on_it(rng: np.random.Generator, scene: Scene, kinds: tuple[str, ...], kind: str) -> Question | None:
    options = []
    for index, thing in enumerate(scene.things):
        if _glyph_kind(thing.glyph) in kinds:
            options += [(index, name) for name in _names(scene, index)[-2:]]
    chosen = _pick(rng, options)
    if chosen is None:
        return None
    index, name = chosen
    glyph = scene.things[index].glyph
    return Question(f"what {_glyph_kind(glyph)} is on the {name}?", _spoken(glyph), kind, (index,), (index,))


def glyph(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "what digit is on the red square?", or which letter."""
    return _on_it(rng, scene, ("digit", "letter"), "glyph")


def number(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "what number is on the red square?"; the answer is two digits, two tokens."""
    return _on_it(rng, scene, ("number",), "number")


def word(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "what word is written in red?"; the answer is spelled letter by letter."""
    index = _pick(rng, list(range(len(scene.signs))))
    if index is None:
        return None
    sign = scene.signs[index]
    text = f"what word is written in {sign.colour}?"
    if len(scene.signs) == 1 and rng.random() < 0.5:
        text = "what word is written?"
    return Question(text, _spoken(sign.word), "word", signs=(index,))


def count(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "how many red shapes are there?", "how many circles are there?"; small and large numbers alike."""
    by_number: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name in (*words.COLOURS, *words.ALL_SHAPES):
        which = tuple(i for i, thing in enumerate(scene.things) if name in (thing.colour, thing.shape))
        spoken = words.ALL_SHAPES.get(name, f"{name} shapes")
        if len(which) <= MOST_COUNTED:
            by_number.setdefault(len(which), []).append((spoken, which))
    wanted = _pick(rng, [n for n in by_number for _ in range(1 if n < 2 else 2)])
    chosen = None if wanted is None else _pick(rng, by_number[wanted])
    if chosen is None:
        return None
    spoken, which = chosen
    return Question(f"how many {spoken} are there?", str(len(which)), "count", which, which)


def exist(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "is there a red circle?"; where not, red things and circles are mostly there, only not together."""
    names = sorted({thing.name for thing in scene.things})
    colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
    mixed = sorted({f"{c} {s}" for c in colours for s in shapes} - set(names))
    yes = rng.random() < 0.5
    if not yes and (not mixed or rng.random() < 0.3):
        options = [f"{c} {s}" for c in words.COLOURS for s in words.SHAPES if f"{c} {s}" not in names]
    else:
        options = names if yes else mixed
    name = _pick(rng, options)
    which = tuple(i for i, thing in enumerate(scene.things) if thing.name == name)
    return Question(f"is there a {name}?", "yes" if which else "no", "exist", which, which) if name else None


def _beside(rng: np.random.Generator, scene: Scene, need_glyph: bool) -> tuple[int, int, str, str] | None:
    options = []
    for index in range(len(scene.things)):
        for name in _names(scene, index)[-2:]:
            for direction in words.ASKED_DIRECTIONS:
                other = neighbour(scene, index, direction)
                if other is None or other < 0:
                    continue
                if not need_glyph or len(scene.things[other].glyph) == 1:
                    options.append((index, other, name, direction))
    return _pick(rng, options)


def _place(direction: str, name: str) -> str:
    return f"{direction} {'of ' if direction in ('left', 'right') else ''}the {name}"


def relation(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "what is left of the red circle?"; the answer is a colour and a shape, two tokens."""
    chosen = _beside(rng, scene, need_glyph=False)
    if chosen is None:
        return None
    index, other, name, direction = chosen
    return Question(
        f"what is {_place(direction, name)}?", scene.things[other].name, "relation", (index,), (index, other)
    )


def two_hop(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "what digit is on the shape left of the red circle?" """
    chosen = _beside(rng, scene, need_glyph=True)
    if chosen is None:
        return None
    index, other, name, direction = chosen
    what = scene.things[other].glyph
    text = f"what {_glyph_kind(what)} is on the shape {_place(direction, name)}?"
    return Question(text, what, "two_hop", (index,), (index, other))


def compare(rng: np.random.Generator, scene: Scene) -> Question | None:
    """ "what is the largest shape?", "what is the smallest shape?"; two tokens."""
    levels = [thing.level for thing in scene.things] or [0]
    options = [
        (word, levels.index(level))
        for word, level in (("largest", max(levels)), ("smallest", min(levels)))
        if levels.count(level) == 1 and min(levels) < max(levels)
    ]
    chosen = _pick(rng, options)
    if chosen is None:
        return None
    which, index = chosen
    return Question(f"what is the {which} shape?", scene.things[index].name, "compare", (index,), (index,))


def lookup(rng: np.random.Generator, scene: Scene) -> Question | None:
    """A note in the prompt says who has what; the picture does not matter."""
    names = [str(name) for name in rng.choice(words.NAMES, int(rng.integers(2, 5)), replace=False)]
    kind = _pick(rng, ["digit", "colour", "shape"])
    pool = {"digit": list(words.DIGITS), "colour": list(words.COLOURS), "shape": list(words.SHAPES)}[kind or "digit"]
    values = [str(value) for value in rng.choice(pool, len(names), replace=False)]
    asked = int(rng.integers(len(names)))
    note = ", ".join(f"{name} has {value}" for name, value in zip(names, values, strict=True))
    return Question(f"note: {note}. what has {names[asked]}?", values[asked], "lookup")


MAKERS: dict[str, Maker] = {
    "colour": colour,
    "shape": shape,
    "glyph": glyph,
    "number": number,
    "word": word,
    "count": count,
    "exist": exist,
    "relation": relation,
    "two_hop": two_hop,
    "compare": compare,
    "lookup": lookup,
}
_IN_PAIRS = ("colour", "shape", "glyph")
KINDS: tuple[str, ...] = (*MAKERS, "pair")
"""Every kind of question; "pair" is about one of two pictures."""


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
    """One question of a kind about one picture, or None where the scene has none."""
    return MAKERS[kind](rng, scene)


def ask_pair(rng: np.random.Generator, scenes: tuple[Scene, Scene]) -> Question | None:
    """One question about the first or the second of two pictures."""
    which = int(rng.integers(2))
    question = ask(rng, scenes[which], str(rng.choice(_IN_PAIRS)))
    ordinal = ("first", "second")[which]
    if question is None:
        return None
    return replace(question, text=f"in the {ordinal} picture, {question.text}", kind="pair", picture=which)


def majority(answers: list[str]) -> float:
    """How often the commonest answer is right: what guessing without the picture can reach."""
    return max(Counter(answers).values()) / len(answers) if answers else 0.0
