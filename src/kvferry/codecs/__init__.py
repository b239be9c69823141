"""How few bits: one method, one file, one line in :data:`CODECS`."""

from __future__ import annotations

from kvferry.codecs.apart import SIDED, Apart
from kvferry.codecs.base import AnyCodec, Codec, JointCoder
from kvferry.codecs.bf16 import BF16
from kvferry.codecs.capsule import Capsule
from kvferry.codecs.coding import decoder_of, encoder_of, for_stage, stack
from kvferry.codecs.delta import Delta
from kvferry.codecs.fp8 import FP8
from kvferry.codecs.grammar import named_text, parse_named
from kvferry.codecs.integer import Integer
from kvferry.codecs.kivi import KIVI
from kvferry.codecs.kvtc import KVTC
from kvferry.codecs.mixed import Mixed
from kvferry.codecs.svd import SVD
from kvferry.codecs.transform import Transform
from kvferry.codecs.turbo import Turbo
from kvferry.plugins import Registry

_ALL: tuple[AnyCodec, ...] = (*SIDED, Apart(), Mixed(), Delta(), SVD(), Transform(), KVTC(), Capsule())

CODECS: dict[str, AnyCodec] = Registry("codecs", {codec.name: codec for codec in _ALL})
"""What a recipe may name, with its default options."""


def parse_codec(text: str) -> AnyCodec:
    """The codec of ``name[:argument][@profile][,key=value...]``, or a :class:`~kvferry.errors.RecipeError` that says
    what exists.

    The argument sets the field that the codec's class names as its ``argument``, what follows an ``@`` the field
    ``profile``.
    """
    return parse_named(CODECS, text)


def codec_text(codec: AnyCodec) -> str:
    """The canonical text that :func:`parse_codec` reads back."""
    return named_text(CODECS, codec)


__all__ = [
    "BF16", "CODECS", "FP8", "KIVI", "KVTC", "SVD", "AnyCodec", "Apart", "Capsule", "Codec", "Delta", "Integer",
    "JointCoder", "Mixed", "Transform", "Turbo", "codec_text", "decoder_of", "encoder_of", "for_stage", "parse_codec",
    "stack",
]  # fmt: skip
