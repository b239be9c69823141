"""How few bits: one method, one file, one line in :data:`CODECS`."""

from __future__ import annotations

from kvferry.codecs.base import Codec, decoder_of, encoder_of
from kvferry.codecs.bf16 import BF16
from kvferry.codecs.delta import Delta
from kvferry.codecs.grammar import lookup, number_text, option_text, with_options
from kvferry.codecs.integer import Integer
from kvferry.codecs.svd import SVD
from kvferry.errors import RecipeError

_ALL: tuple[Codec, ...] = (BF16(), *(Integer(bits) for bits in range(1, 9)), Delta(), SVD())

CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}
"""What a recipe may name, with its default options."""


def parse_codec(text: str) -> Codec:
    """The codec of ``name[:argument][@profile][,key=value...]``, or a :class:`~kvferry.errors.RecipeError` that says
    what exists.

    The argument sets the field that the codec's class names as its ``argument``, what follows an ``@`` the field
    ``profile``.
    """
    head, *options = text.split(",")
    head, at, profile = (part.strip() for part in head.partition("@"))
    name, colon, argument = (part.strip() for part in head.partition(":"))
    default = lookup(CODECS, name, "codec")
    marked = {}
    for mark, what, key, value in (
        (colon, "argument", getattr(default, "argument", ""), argument),
        (at, "profile", "profile", profile),
    ):
        if mark and not hasattr(default, key):
            raise RecipeError(f"the codec {name!r} takes no {what}, but {value!r} was given")
        if mark:
            marked[key] = f"{key}={value}"
    return with_options(default, name, [*marked.values(), *options])


def codec_text(codec: Codec) -> str:
    """The canonical text that :func:`parse_codec` reads back."""
    default = CODECS[codec.name]
    text, argument = codec.name, getattr(codec, "argument", "")
    changed = dict(x.split("=", 1) for x in option_text(codec, default).split(",")[1:])
    if argument:
        changed.pop(argument, None)
        text += f":{number_text(getattr(codec, argument))}"
    if "profile" in changed:
        text += f"@{changed.pop('profile')}"
    return text + "".join(f",{key}={value}" for key, value in changed.items())


__all__ = [
    "BF16",
    "CODECS",
    "SVD",
    "Codec",
    "Delta",
    "Integer",
    "codec_text",
    "decoder_of",
    "encoder_of",
    "parse_codec",
]
