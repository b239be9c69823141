"""What an edge is asked to do, looked at before it does anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from kvferry.errors import InputError
from kvferry.messages import Messages
from kvferry.modes import LocalMode, Mode, Question, parse_mode
from kvferry.policy import PointTable, read_points
from kvferry.policy.situation import PRIVACY, broken_rule

TALKS = ("kv", "translate", "local")
"""Modes in which the edge's own model reads the prompt whose cache is answered from, whatever it is."""
SHIPS_FIRST = ("kv", "translate")


def asked_of(images: Any, question: str, messages: Any, ship_first: bool, tiers: int, keep_metadata: bool) -> Question:
    """One question, given in words or as messages.

    Raises
    ------
    InputError
        Neither or both, or messages that cannot be passed on as they are meant.
    """
    pictures: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    if messages is None:
        return Question(pictures, question, ship_first, tiers, keep_metadata)
    if question:
        raise InputError("messages hold the question; pass one of the two")
    said = Messages.parse(messages, pictures)
    whole = None if said.single else said
    if whole is not None and ship_first:
        raise InputError("a conversation's cache is made with its question; leave ship_first out")
    return Question(said.images, said.question, ship_first, tiers, keep_metadata, whole)


def check_talk(asked: Question, mode: Mode | LocalMode) -> None:
    """Refuse a mode that would leave a system prompt or earlier turns behind."""
    if asked.messages is not None and mode.NAME not in TALKS:
        raise InputError(
            f"mode {mode.NAME} sends pictures and one question; a system prompt, earlier turns, and pictures between "
            "words cross as a cache: use mode kv, translate or local"
        )


def checked_mode(
    mode: str, recipe: object, privacy: Collection[str] = (), ship_first: bool = False
) -> Mode | LocalMode:
    """The mode of a text, as :meth:`Edge.ask` takes it.

    Raises
    ------
    InputError, RecipeError
        There is none, it lets out what ``privacy`` keeps here, or it cannot ship before its question.
    """
    chosen = parse_mode(mode, recipe)
    if ship_first and chosen.NAME not in SHIPS_FIRST:
        raise InputError(f"only a cache ships before its question; mode {chosen.NAME} takes no ship_first")
    if broken := broken_rule(chosen.LEAVES, checked_rules(privacy)):
        raise InputError(f"mode {chosen} is not allowed here ({broken}); use kv or local")
    return chosen


def checked_rules(privacy: Collection[str]) -> frozenset[str]:
    """Privacy rules; InputError for one that does not exist."""
    rules = frozenset([privacy] if isinstance(privacy, str) else privacy)
    if unknown := rules - set(PRIVACY):
        raise InputError(f"there is no privacy rule {', '.join(sorted(unknown))}; use {', '.join(PRIVACY)}")
    return rules


def one_table(points: str | Path | PointTable) -> PointTable:
    """The only table of a file; InputError where it holds several."""
    if isinstance(points, PointTable):
        return points
    tables = read_points(points)
    if len(tables) != 1:
        raise InputError(f"{points} holds {len(tables)} tables; keep the one of these two models, or pass it by itself")
    return tables[0]
