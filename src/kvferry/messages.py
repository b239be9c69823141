"""Conversations as Transformers and others write them: a list of messages with a role and a content."""

from __future__ import annotations

import base64
import binascii
import json
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from kvferry.errors import InputError

ROLES = ("system", "user", "assistant")
SOURCES = ("image", "path", "url", "base64", "image_url")
"""Where a picture of a message may be, as in ``{"type": "image", "path": "scene.png"}``."""
FETCH_BYTES, FETCH_SECONDS = 64 * 1024 * 1024, 20.0
_HOW = 'write [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what?"}]}]'


@dataclass(frozen=True)
class Shown:
    """A picture's place in a message; ``source`` is what :func:`kvferry.pictures.open_picture` reads."""

    source: Any


@dataclass(frozen=True)
class Message:
    """What one side said: texts and pictures, in order. ``plain`` where its content was one string."""

    role: str
    parts: tuple[str | Shown, ...]
    plain: bool = False


@dataclass(frozen=True)
class Messages:
    """A conversation that ends with what a user asks."""

    turns: tuple[Message, ...]

    @classmethod
    def parse(cls, said: Any, images: Sequence[Any] = (), folder: Path | None = None) -> Messages:
        """Check messages.

        Parameters
        ----------
        said : sequence of mappings
            Each with ``role`` (system, user or assistant) and ``content``: a string, or a list of
            ``{"type": "text", "text": ...}`` and ``{"type": "image", "image" | "path" | "url" | "base64": ...}``.
        images : sequence, optional
            The pictures of those ``{"type": "image"}`` that say nothing about where theirs is, in order.
        folder : Path, optional
            What paths in messages are relative to.

        Raises
        ------
        InputError
            Anything that could not be passed on to a model as it was meant.
        """
        if isinstance(said, Messages):
            return said
        if not isinstance(said, Sequence) or isinstance(said, str | bytes) or not said:
            raise InputError(f"messages are a list with one message at least; {_HOW}")
        waiting = list(images)
        turns = tuple(_message(number, each, waiting, folder) for number, each in enumerate(said, start=1))
        if waiting:
            raise InputError(f"{len(images)} pictures for {len(images) - len(waiting)} places in the messages; {_HOW}")
        if turns[-1].role != "user":
            raise InputError(f"the last message is the {turns[-1].role}'s; end with what the user asks")
        if not any(isinstance(part, str) for part in turns[-1].parts):
            raise InputError("the last message asks nothing; give it a text")
        return cls(turns)

    @classmethod
    def read(cls, path: Path) -> Messages:
        """Messages in a JSON file: a list, or an object that holds one as ``messages``. Paths are relative to the file.

        Raises
        ------
        InputError
            There is no such file, or it holds no messages.
        """
        try:
            said = json.loads(path.read_text())
        except OSError as error:
            raise InputError(f"cannot read {path} ({error.strerror}); give a JSON file of messages") from None
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}); {_HOW}") from None
        return cls.parse(said.get("messages") if isinstance(said, dict) else said, folder=path.parent)

    @property
    def images(self) -> tuple[Any, ...]:
        """The pictures, in the order in which they stand."""
        return tuple(part.source for turn in self.turns for part in turn.parts if isinstance(part, Shown))

    @property
    def question(self) -> str:
        """The text of the last message."""
        return "\n".join(part for part in self.turns[-1].parts if isinstance(part, str))

    @property
    def single(self) -> bool:
        """Whether this is one user's message, pictures first and one text behind: a plain question."""
        (*shown, text), others = self.turns[-1].parts, self.turns[:-1]
        return not others and isinstance(text, str) and all(isinstance(part, Shown) for part in shown)

    def with_images(self, images: Sequence[Any]) -> Messages:
        """The same with other pictures in the same places."""
        left = iter(images)

        def filled(turn: Message) -> Message:
            return replace(turn, parts=tuple(x if isinstance(x, str) else Shown(next(left)) for x in turn.parts))

        return Messages(tuple(map(filled, self.turns)))


def _message(number: int, said: Any, waiting: list[Any], folder: Path | None) -> Message:
    where = f"message {number}"
    if not isinstance(said, Mapping):
        raise InputError(f"{where} is a {type(said).__name__}; {_HOW}")
    said = {key: value for key, value in said.items() if value is not None}
    if said.get("role") not in ROLES:
        raise InputError(f"{where} has the role {said.get('role')!r}; use one of {', '.join(ROLES)}")
    if unknown := set(said) - {"role", "content"}:
        raise InputError(f"{where} has {', '.join(sorted(unknown))}, which would be lost; leave it out")
    content = said.get("content")
    if isinstance(content, str):
        return Message(said["role"], (_text(where, content),), plain=True)
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise InputError(f"{where} has no content; {_HOW}")
    return Message(said["role"], tuple(_part(where, part, waiting, folder) for part in content))


def _part(where: str, part: Any, waiting: list[Any], folder: Path | None) -> str | Shown:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and set(part) == {"type", "text"}:
        return _text(where, part["text"])
    if kind not in ("image", "image_url"):
        raise InputError(f"{where} has a part {kind or part!r} that is neither text nor image; {_HOW}")
    found = {key: value for key, value in part.items() if key != "type" and value is not None}
    if unknown := set(found) - set(SOURCES):
        raise InputError(f"{where}: {', '.join(sorted(unknown))} of a picture would be lost; leave it out")
    if len(found) > 1:
        raise InputError(f"{where}: a picture is in one place, not in {' and '.join(found)}")
    if found:
        ((key, value),) = found.items()
        return Shown(_source(where, key, value, folder))
    if not waiting:
        raise InputError(f"{where}: a picture without image, path or url, and none is left of images; {_HOW}")
    return Shown(waiting.pop(0))


def _text(where: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where} has an empty text; write at least one word, or leave it out")
    return text


def _source(where: str, key: str, value: Any, folder: Path | None) -> Any:
    """A picture, a path or the bytes of a file."""
    if key == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if key == "base64":
        return _decoded(where, str(value))
    if not isinstance(value, str):
        return value
    scheme = urlparse(value).scheme.lower()
    if scheme in ("http", "https"):
        return _fetched(where, value)
    if scheme == "data":
        return _decoded(where, value.partition(",")[2])
    path = Path(unquote(urlparse(value).path) if scheme == "file" else value).expanduser()
    return str(path if folder is None or path.is_absolute() else folder / path)


def _decoded(where: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where}: a picture is not base64; encode the bytes of a PNG or JPEG file") from None


def _fetched(where: str, url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as reply:
            data: bytes = reply.read(FETCH_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {url} cannot be fetched ({error}); give a path") from None
    if len(data) > FETCH_BYTES:
        raise InputError(f"{where}: {url} has more than {FETCH_BYTES:,} bytes; give a smaller picture")
    return data
