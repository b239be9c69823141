"""How few bits: one method, one file, one line in :data:`CODECS`."""

from __future__ import annotations

from kvferry.codecs.base import Codec
from kvferry.codecs.bf16 import BF16
from kvferry.codecs.grammar import lookup, option_text, with_options
from kvferry.codecs.integer import Integer
from kvferry.errors import RecipeError

_ALL: tuple[Codec, ...] = (BF16(), *(Integer(bits) for bits in range(1, 9)))

CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}
"""What a recipe may name, with its default options."""


def parse_codec(text: str) -> Codec:
    """The codec of ``name[,key=value...]``, or a :class:`~kvferry.errors.RecipeError` that says what exists."""
    head, *options = text.split(",")
    name, colon, argument = head.strip().partition(":")
    default = lookup(CODECS, name, "codec")
    if colon:
        raise RecipeError(f"the codec {name!r} takes no argument, but {argument!r} was given")
    return with_options(default, name, options)


def codec_text(codec: Codec) -> str:
    """The canonical text that :func:`parse_codec` reads back."""
    return codec.name + option_text(codec, CODECS[codec.name])


__all__ = ["BF16", "CODECS", "Codec", "Integer", "codec_text", "parse_codec"]
