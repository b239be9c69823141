"""What people type to ask: pictures, a question, further turns; looked at before anything is loaded."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.errors import InputError, LinkError

if TYPE_CHECKING:
    from kvferry.messages import Messages

HOW = 'write picture files, then the question in quotes: kvferry ask scene.png "what colour is the circle?"'
CONNECT_SECONDS = 1.0


def pictures_and_question(words: Sequence[str]) -> tuple[list[str], str]:
    """``PICTURE... QUESTION``, taken apart and checked.

    Raises
    ------
    InputError
        There is no question, a picture stands where it should be or the other way round, or a picture cannot be used.
    """
    if not words:
        raise InputError(f"there is nothing to ask; {HOW}")
    *pictures, question = words
    if names_file(question):
        asked = next((word for word in pictures if not names_file(word)), None)
        if asked is None:
            raise InputError(f"there is no question, only {_listed(words)}; {HOW}")
        raise InputError(f"the question comes last, but {question!r} is a file and {asked!r} comes before it; {HOW}")
    check_pictures(pictures)
    if not question.strip():
        raise InputError(f"the question is empty; {HOW}")
    return pictures, question


def read_messages(path: Path, words: Sequence[str] | None, follow: Sequence[str] | None) -> Messages:
    """The messages in a file, their pictures checked.

    Raises
    ------
    InputError
        There are none, or further words beside them.
    """
    if words or follow:
        raise InputError("--messages holds pictures, turns and question; leave words and --follow out")
    from kvferry.messages import Messages
    from kvferry.pictures import check_picture

    found = Messages.read(path)
    for image in found.images:
        check_picture(image)
    return found


def check_pictures(pictures: Sequence[str]) -> None:
    """Refuse what is not there, or cannot be used, by its header."""
    from kvferry.pictures import check_picture

    for picture in pictures:
        if not Path(picture).exists():
            raise InputError(f"there is no picture at {picture}; {HOW}")
        check_picture(picture)


def turn_of(text: str) -> tuple[list[str], str]:
    """``[@PICTURE...] QUESTION`` of a further turn: the pictures that join, and the question."""
    joining: list[str] = []
    while text.startswith("@"):
        picture, _, text = text.partition(" ")
        joining.append(picture[1:])
        text = text.lstrip()
    check_pictures(joining)
    if not text.strip() or names_file(text):
        raise InputError(f"a further turn asks nothing ({text!r}); write '@FILE QUESTION', or the question alone")
    return joining, text


def check_reachable(cloud: str) -> None:
    """Refuse an address where nobody listens, before a model is loaded for it.

    Raises
    ------
    LinkError
        The host is unknown, or refuses. One that is silent may only be slow, and is left to the call itself.
    """
    from kvferry.link.address import parse_address

    try:
        socket.create_connection(parse_address(cloud), timeout=CONNECT_SECONDS).close()
    except TimeoutError:
        return
    except OSError as error:
        why = f"the cloud at {cloud} cannot be reached ({error.strerror or error})"
        raise LinkError(f"{why}; see that `kvferry serve` runs there") from None


def names_file(text: str) -> bool:
    """Whether a text is a file's name rather than words: it is there, or looks like a picture's."""
    from kvferry.edge.sources import names_picture

    try:
        there = bool(text.strip()) and Path(text).exists()
    except (OSError, ValueError):  # too long for a name
        return False
    return there or names_picture(text)


def _listed(words: Sequence[str]) -> str:
    return f"a picture ({words[0]})" if len(words) == 1 else f"{len(words)} files"
