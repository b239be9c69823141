"""What a chat request asks for, checked: what cannot be honoured is refused by name."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvferry.errors import InputError
from kvferry.messages import Messages
from kvferry.pictures import WIRE_FORMATS

CACHE = "kvferry_cache"
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0,), "top_p": (1,), "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "tool_choice": ("none",), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "store": (False,), "functions": ([],),
    "parallel_tool_calls": (True, False),
}  # fmt: skip
"""What else a request may say, and the values that ask for no more than a greedy answer in words."""
IGNORED = ("seed", "user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
"""What changes nothing about a greedy answer."""
MOST_STOPS = 4
DATA = "data:"
_IMAGE_HOW = 'write {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'


@dataclass(frozen=True)
class Chat:
    """One request.

    Parameters
    ----------
    messages : Messages
        The conversation, its pictures as file bytes.
    cache : bytes or None
        A bitstream that stands for the conversation so far.
    max_tokens : int
    stop : tuple of str
        Texts that end the answer, which does not contain them.
    stream, usage : bool
        Whether the answer comes in pieces, and whether they end with what it cost.
    """

    model: str
    messages: Messages | None
    cache: bytes | None
    question: str | None
    max_tokens: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool


class RefusalError(InputError):
    """A request cannot be served: HTTP's status, the parameter that is at fault, and OpenAI's code for it."""

    def __init__(self, message: str, status: int, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class ParameterError(RefusalError):
    """A parameter of a request cannot be used; ``param`` names it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, 400, param)


def parse(body: Any, most_tokens: int) -> Chat:
    """The request in a JSON object.

    Raises
    ------
    ParameterError
        It says which parameter, and what to do.
    """
    if not isinstance(body, Mapping):
        raise ParameterError("the body is no JSON object; send model and messages", "body")
    known = {"model", "messages", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options"}
    for name, value in body.items():
        if name in known or name in IGNORED or value is None:
            continue
        if name not in NEUTRAL:
            raise ParameterError(f"{name} is not known here; leave it out", name)
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in NEUTRAL[name]):
            neutral = " or ".join(map(repr, NEUTRAL[name]))
            raise ParameterError(f"answers are greedy words, so {name} is {neutral} or left out, not {value!r}", name)
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping) or not isinstance(body.get("stream") or False, bool):
        raise ParameterError("stream is true or false, and stream_options an object", "stream")
    messages, cache, question = _messages(body.get("messages"))
    return Chat(
        model=_string(body.get("model"), "model"),
        messages=messages,
        cache=cache,
        question=question,
        max_tokens=_max_tokens(body, most_tokens),
        stop=_stops(body.get("stop")),
        stream=bool(body.get("stream")),
        usage=bool(options.get("include_usage")),
    )


def _string(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise ParameterError(f"{param} is a text; /v1/models says which models there are", param)
    return value


def _max_tokens(body: Mapping[str, Any], most: int) -> int:
    names = [x for x in ("max_completion_tokens", "max_tokens") if body.get(x) is not None]
    wanted = body[names[0]] if names else most
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= most:
        raise ParameterError(f"{names[0]} is 1 to {most} here, not {wanted!r}", names[0])
    return wanted


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else list(value or ()) if isinstance(value, list | None) else [None]
    if len(stops) > MOST_STOPS or not all(isinstance(x, str) and x for x in stops):
        raise ParameterError(f"stop is a text or up to {MOST_STOPS} of them, none of them empty", "stop")
    return tuple(stops)


def _messages(said: Any) -> tuple[Messages | None, bytes | None, str | None]:
    """The messages; or the cache that stands for all but the last one, and what is asked on top of it."""
    if not isinstance(said, list) or not all(isinstance(x, Mapping) for x in said):
        raise ParameterError("messages are a list of objects with role and content", "messages")
    caches = list[bytes]()
    turns = [{**turn, "content": _content(turn.get("content"), caches)} for turn in said]
    if not caches:
        try:
            return Messages.parse(turns), None, None
        except InputError as error:
            raise ParameterError(str(error), "messages") from None
    content = turns[0]["content"]
    if len(caches) > 1 or len(turns) > 1 or turns[0].get("role") != "user" or not isinstance(content, list):
        raise ParameterError(f"a {CACHE} stands for all that was said: send one user message with it", "messages")
    if any(part["type"] != "text" for part in content):
        raise ParameterError(f"a {CACHE} holds the pictures; send no others with it", "messages")
    return None, caches[0], "\n".join(part["text"] for part in content) or None


def _content(content: Any, caches: list[bytes]) -> Any:
    """A message's content with the bytes of its pictures; caches in it are put aside."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(x, Mapping) for x in content):
        raise ParameterError("content is a text or a list of parts", "messages")
    parts = []
    for part in content:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url":
            parts.append({"type": "image", "image": _picture(part.get("image_url"))})
        elif kind == CACHE:
            held = part.get(CACHE)
            caches.append(_base64(held.get("data") if isinstance(held, Mapping) else None))
        else:
            raise ParameterError(f"a part is text, image_url or {CACHE}, not {kind!r}", "messages")
    return parts


def _picture(image: Any) -> bytes:
    url = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(url, str):
        raise ParameterError(f"image_url holds no url; {_IMAGE_HOW}", "messages")
    if not url.startswith(DATA):
        raise ParameterError(f"this cloud fetches nothing from addresses that requests name; {_IMAGE_HOW}", "messages")
    head, comma, data = url.partition(",")
    formats = [f"image/{name.lower()}" for name in WIRE_FORMATS]
    if not comma or not head.endswith(";base64") or head[len(DATA) :].partition(";")[0].lower() not in formats:
        raise ParameterError(f"a picture is {', '.join(formats)} in base64; {_IMAGE_HOW}", "messages")
    return _base64(data)


def _base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ParameterError("what should be base64 is not; encode the bytes with it", "messages") from None
