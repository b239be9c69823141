"""What a stream says about its cache before the first frame."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from kvferry.bitstream import layout as layouts
from kvferry.bitstream.bounds import MAX_LAYERS, Bounds
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.checkpoint import known_as
from kvferry.codecs import AnyCodec, for_stage, parse_codec
from kvferry.codecs.grammar import without_files
from kvferry.errors import CorruptError, InputError, RecipeError, VersionError
from kvferry.wire import bitstream_pb2 as pb

MAX_DIM = 1 << 16
MAX_TIERS = 64
DTYPES = {"bfloat16": pb.BFLOAT16, "float16": pb.FLOAT16, "float32": pb.FLOAT32}
"""By PyTorch's names."""
_HEXADECIMAL = re.compile(r"(?:[0-9a-f]{2})+")


class Shape(NamedTuple):
    """One layer: ``dtype`` is what the sender held; codecs decode to bfloat16 whatever it was."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str


@dataclass(frozen=True)
class Header:
    """A cache without its keys and values; the fields are those of :class:`kvferry.cache.KVCache`.

    Besides, ``tiers`` is how many frames a layer has at most; ``entries`` the kept tokens of all heads of all layers,
    where the sender said so.
    """

    fingerprint: str
    model_name: str
    recipe: str
    length: int
    layout: PromptLayout
    shapes: tuple[Shape, ...]
    tiers: int = 1
    entries: int | None = None

    @property
    def full_bf16_bytes(self) -> int:
        """Size of the unpruned cache in BF16, as :attr:`kvferry.cache.KVCache.full_bf16_bytes`."""
        return self.length * sum(2 * x.kv_heads * (x.key_dim + x.value_dim) for x in self.shapes)

    @property
    def codec(self) -> AnyCodec:
        """What decodes the payloads; :class:`VersionError` where this version does not have it."""
        return codec_of(self.recipe)

    @property
    def lossless(self) -> bool:
        """Whether payloads are compressed by zstd, but those that say otherwise."""
        return lossless(self.recipe)


def codec_of(recipe: str) -> AnyCodec:
    """What decodes a recipe's payloads; :class:`VersionError` where this version does not have it.

    Only what follows the first bar is looked at: a reader need not know the selection, and opens no file that it names.
    """
    try:
        return for_stage(parse_codec(recipe.split("|")[1].strip()), lossless(recipe))
    except (IndexError, RecipeError) as error:
        raise VersionError(f"cannot decode the recipe {recipe!r} ({error}); update kvferry") from None


def lossless(recipe: str) -> bool:
    """Whether a recipe ends in zstd; :class:`VersionError` where this version does not have what it ends in."""
    stages = [stage.strip() for stage in recipe.split("|")[2:]]
    if stages not in ([], ["zstd"]):
        raise VersionError(f"cannot decode the recipe {recipe!r} (unknown lossless stage); update kvferry")
    return bool(stages)


def encode(cache: KVCache, tiers: int = 1) -> pb.Header:
    """The message for ``cache``; of its layers only shapes, dtypes and counts are read."""
    shapes = groupby(_shape(layer) for layer in cache)
    message = pb.Header(
        model_name=known_as(cache.model_name),
        recipe=without_files(cache.recipe),
        pending=len(cache.layout) - cache.length,
        layout=layouts.encode(cache.layout),
        layers=[
            pb.LayerShape(
                repeat=len(list(same)),
                kv_heads=shape.kv_heads,
                key_dim=shape.key_dim,
                value_dim=shape.value_dim if shape.value_dim != shape.key_dim else 0,
                dtype=DTYPES[shape.dtype],
            )
            for shape, same in shapes
        ],
        tiers=tiers if tiers > 1 else 0,
        entries=sum(sum(layer.per_head) for layer in cache) if tiers > 1 else 0,
    )
    if _HEXADECIMAL.fullmatch(cache.fingerprint):
        message.digest = bytes.fromhex(cache.fingerprint)
    else:
        message.fingerprint_text = cache.fingerprint
    return message


def decode(message: pb.Header, bounds: Bounds) -> Header:
    """The header, every number in it within ``bounds``."""
    shapes: list[Shape] = []
    for layer in message.layers:
        if not 0 < layer.repeat <= MAX_LAYERS - len(shapes):
            raise CorruptError(f"more layers than {MAX_LAYERS}, or none")
        shapes += [_checked(layer)] * layer.repeat
    layout = layouts.decode(message.layout, bounds.tokens)
    if not shapes or message.pending >= len(layout):
        raise CorruptError(f"{len(shapes)} layers for all but {message.pending} of {len(layout)} tokens")
    if message.tiers > MAX_TIERS:
        raise CorruptError(f"{message.tiers} tiers, where at most {MAX_TIERS} are possible")
    header = Header(
        fingerprint=message.digest.hex() or message.fingerprint_text,
        model_name=message.model_name,
        recipe=message.recipe,
        length=len(layout) - message.pending,
        layout=layout,
        shapes=tuple(shapes),
        tiers=message.tiers or 1,
        entries=message.entries if message.tiers > 1 else None,
    )
    bounds.check(header)
    return header


def _checked(layer: pb.LayerShape) -> Shape:
    sizes = (layer.kv_heads, layer.key_dim, layer.value_dim or layer.key_dim)
    if not all(0 < size <= MAX_DIM for size in sizes):
        raise CorruptError("a layer of {} heads with keys of {} and values of {} numbers".format(*sizes))
    for dtype, number in DTYPES.items():
        if number == layer.dtype:
            return Shape(*sizes, dtype)
    raise CorruptError(f"a layer of the unknown dtype {layer.dtype}")


def _shape(layer: LayerCache) -> Shape:
    dtype = str(layer.keys.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"a cache of {dtype} cannot be encoded; convert it to bfloat16 first")
    return Shape(layer.heads, layer.keys.shape[2], layer.values.shape[2], dtype)
