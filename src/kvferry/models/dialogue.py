"""Prompts from messages: what the model's own template makes of several turns, and what each token of it is for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.cache import Role
from kvferry.errors import UnsupportedModelError
from kvferry.messages import Message, Messages

Span = tuple[int, int, Role]


class Rendered(NamedTuple):
    """A prompt's text, and where in it the messages' texts stand."""

    text: str
    spans: tuple[Span, ...]


def render(source: Any, messages: Messages, *, parts: bool) -> Rendered:
    """The words of a template around messages.

    Every text is found again in what the template wrote, so that none is lost: the same messages are written with marks
    in the texts' places, and the two are held against each other.

    Parameters
    ----------
    source
        The processor or tokenizer whose ``apply_chat_template`` writes.
    parts : bool
        Whether it reads contents as lists; else each becomes one string.

    Raises
    ------
    UnsupportedModelError
        The template refuses the messages (a system prompt, two turns of one side), or leaves something of them out.
    """
    turns = messages.turns if parts else tuple(replace(turn, parts=(_joined(turn),)) for turn in messages.turns)
    said = [(i, x) for i, turn in enumerate(turns) for x in turn.parts if isinstance(x, str)]
    marks = [f"KVFERRY{index}TEXT" for index in range(len(said))]
    written = _apply(source, [_written(turn, parts) for turn in turns])
    marked = _apply(source, [_written(turn, parts) for turn in _with_texts(turns, marks)])
    for (i, _), mark in zip(said, marks, strict=True):
        if marked.count(mark) != 1:
            raise _lost(i, turns[i])
    between = re.split("|".join(marks), marked)
    spans, at = [], len(between[0])
    for (i, text), later in zip(said, between[1:], strict=True):
        forms = (text, text.strip(), text.rstrip(), text.lstrip())
        kept = next((x for x in forms if written.startswith(x + later, at)), None)
        if kept is None or not written.startswith(between[0]):
            raise _lost(i, turns[i])
        spans.append((at, at + len(kept), Role.QUESTION if i == len(turns) - 1 else Role.CONTEXT))
        at += len(kept) + len(later)
    _check_pictures(source, turns, parts, written)
    return Rendered(written, tuple(spans))


def plain(messages: Messages, placeholder: str) -> Rendered:
    """The same for a model without a template: what :class:`kvferry.models.prompt.Prompter` writes then.

    Raises
    ------
    UnsupportedModelError
        A system prompt, for which there is no place.
    """
    text, spans = "", []
    for i, turn in enumerate(messages.turns):
        if turn.role == "system":
            raise _lost(i, turn)
        asks = turn.role == "user"
        text += placeholder * sum(not isinstance(part, str) for part in turn.parts) if asks else " "
        said = _joined(turn)
        spans.append((len(text), len(text) + len(said), Role.QUESTION if turn is messages.turns[-1] else Role.CONTEXT))
        text += said + ("\nAnswer:" if asks else "\n")
    return Rendered(text, tuple(spans))


def roles_of(
    spans: Sequence[Span],
    read: Sequence[tuple[int, tuple[int, int]]],
    ids: npt.NDArray[np.int64],
    visual: Sequence[int],
) -> npt.NDArray[np.uint8]:
    """What each token of a prompt is for.

    Parameters
    ----------
    spans : of the rendered text
    read : sequence of (token id, (start, end))
        The rendered text as the tokenizer reads it, before pictures are put in.
    ids : int64 ``[n]``
        The prompt: the same with many tokens for every picture, and perhaps others around them.
    visual : token ids that stand for pieces of pictures

    Returns
    -------
    uint8 ``[n]``
        Values of :class:`~kvferry.cache.Role`.
    """
    roles = np.full(len(ids), Role.SPECIAL, dtype=np.uint8)
    seen = np.isin(ids, list(visual))
    roles[seen] = Role.CONTEXT
    words = [(token, _role(spans, *span)) for token, span in read if token not in visual]
    where = np.flatnonzero(~seen)
    for a, b, size in _matching([token for token, _ in words], ids[where].tolist()):
        roles[where[b : b + size]] = [role for _, role in words[a : a + size]]
    return roles


def _matching(words: list[int], ids: list[int]) -> list[tuple[int, int, int]]:
    """Equal runs of two sequences; most often they are one."""
    if words == ids:
        return [(0, 0, len(ids))]
    return [tuple(block) for block in SequenceMatcher(None, words, ids, autojunk=False).get_matching_blocks()]  # type: ignore[misc]


def _role(spans: Sequence[Span], start: int, end: int) -> Role:
    return next((role for a, b, role in spans if start < b and end > a), Role.SPECIAL)


def _joined(turn: Message) -> str:
    return "\n".join(part for part in turn.parts if isinstance(part, str))


def _written(turn: Message, parts: bool) -> dict[str, Any]:
    if not parts or turn.plain:
        return {"role": turn.role, "content": _joined(turn)}
    content = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image"} for x in turn.parts]
    return {"role": turn.role, "content": content}


def _with_texts(turns: Sequence[Message], texts: Sequence[str]) -> list[Message]:
    left = iter(texts)
    return [replace(t, parts=tuple(next(left) if isinstance(x, str) else x for x in t.parts)) for t in turns]


def _check_pictures(source: Any, turns: Sequence[Message], parts: bool, written: str) -> None:
    """Refuse a template that writes the same with and without some picture."""
    for i, turn in enumerate(turns):
        for at, part in enumerate(turn.parts):
            if not isinstance(part, str) and len(turn.parts) > 1:
                less = replace(turn, parts=turn.parts[:at] + turn.parts[at + 1 :])
                without = [_written(less if k == i else other, parts) for k, other in enumerate(turns)]
                if not parts or _apply(source, without) == written:
                    raise UnsupportedModelError(
                        f"this model's chat template has no place for a picture in message {i + 1} ({turn.role}); "
                        "put pictures into the user's messages"
                    )


def _apply(source: Any, said: list[dict[str, Any]]) -> str:
    try:
        return str(source.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, and raises what it likes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        roles = ", ".join(turn["role"] for turn in said)
        raise UnsupportedModelError(
            f"this model's chat template takes no messages of {roles} ({reason}); put a system prompt into the first "
            "question, or let user and assistant take turns"
        ) from None


def _lost(i: int, turn: Message) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this model's chat template leaves out or rewrites message {i + 1} ({turn.role}); say it in a user's message, "
        "or pass raw inputs (prefill_inputs)"
    )
