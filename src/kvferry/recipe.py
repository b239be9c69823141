"""Selection + codec by name: ``compress()`` and ``decompress()``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvferry.bitstream import Writer, decompress_stream
from kvferry.cache import KVCache, LayerCache
from kvferry.codecs import BF16, Codec, codec_text, parse_codec
from kvferry.codecs.grammar import lookup, number_text, option_text, with_options
from kvferry.errors import EvidenceError, RecipeError
from kvferry.evidence import Evidence, EvidenceRequest, Prefilled
from kvferry.selection import SCORERS, Scorer, Selection, evict, top_tokens

WITHOUT_FRACTION = ("full", "none")
LOSSLESS = ("zstd",)


@dataclass(frozen=True)
class Recipe:
    """Which tokens stay, in how few bits, and whether a lossless stage follows.

    Its text is ``selection[@fraction][,key=value...] | codec[,key=value...] [| zstd]``, for instance
    ``q2c@0.25|int8`` or ``snapkv@0.1,window=16,pool=max|int4|zstd``. ``str()`` gives the canonical form: no spaces,
    no option that is at its default; ``Recipe.parse(str(recipe)) == recipe``.

    Parameters
    ----------
    selection
        A scorer: one of the dataclasses in :data:`kvferry.selection.SCORERS`.
    fraction : float
        Of the prompt's tokens, per layer; exact to a token. 1 for ``full`` and ``none``, which take none.
    codec
        One of :data:`kvferry.codecs.CODECS`; BF16 where the text names none.
    lossless : str or None
        ``"zstd"`` compresses every payload that gets smaller by it.
    """

    selection: Scorer
    fraction: float = 1.0
    codec: Codec = field(default_factory=BF16)
    lossless: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise RecipeError(
                f"the fraction of kept tokens must lie in (0, 1], not {self.fraction:g}; "
                "q2c@0.25 keeps a quarter, none|bf16 drops every visual token"
            )
        if self.fraction != 1.0 and _name(self.selection) in WITHOUT_FRACTION:
            raise RecipeError(f"{_name(self.selection)} takes no fraction; leave out '@{self.fraction:g}'")
        if self.lossless is not None:
            lookup(dict.fromkeys(LOSSLESS), self.lossless, "lossless stage")

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """The recipe in ``text``; a :class:`~kvferry.errors.RecipeError` says what is wrong and what exists."""
        if isinstance(text, Recipe):
            return text
        parts = [part.strip() for part in text.split("|")]
        if len(parts) > 3 or not all(parts):
            raise RecipeError(
                f"{text!r} is not a recipe; write selection[@fraction][,option=value] | codec [| zstd], "
                "for instance q2c@0.25|int8"
            )
        selection, fraction = _parse_selection(parts[0])
        codec = parse_codec(parts[1]) if len(parts) > 1 else BF16()
        return cls(selection, fraction, codec, parts[2] if len(parts) > 2 else None)

    def __str__(self) -> str:
        name = _name(self.selection)
        fraction = "" if name in WITHOUT_FRACTION else f"@{number_text(self.fraction)}"
        parts = [name + fraction + option_text(self.selection, SCORERS[name]()), codec_text(self.codec)]
        return "|".join(parts + ([self.lossless] if self.lossless else []))

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """What prefill must observe of attention for this recipe."""
        return self.selection.requests

    def select(self, source: Prefilled | KVCache) -> Selection:
        """The tokens to keep.

        Raises
        ------
        EvidenceError
            The scorer needs attention and ``source`` is a bare cache, or prefill was not asked to observe it.
        """
        cache, evidence = self._evidence(source)
        own = getattr(self.selection, "select", None)
        if own is not None:
            chosen: Selection = own(cache, evidence, self.fraction)
            return chosen
        scores = self.selection.score(cache, evidence)
        return top_tokens(scores, self.fraction, cache.layers[0].keys.shape[0])

    def keep(self, source: Prefilled | KVCache) -> KVCache:
        """The cache with only the selected tokens, nothing quantized; it carries this recipe's name."""
        cache = source.cache if isinstance(source, Prefilled) else source
        if _name(self.selection) != "full":
            cache = evict(cache, self.select(source))
        return replace(cache, recipe=str(self))

    def apply(self, source: Prefilled | KVCache) -> KVCache:
        """What ``decompress(compress(source, self))`` gives, without the bytes in between."""
        cache = self.keep(source)
        return replace(cache, layers=tuple(self._round_trip(cache, i) for i in range(len(cache.layers))))

    def _round_trip(self, cache: KVCache, index: int) -> LayerCache:
        layer = cache.layers[index]
        payload = self.codec.encode(index, layer.keys, layer.values, layer.positions, cache.layout)
        shapes = [tuple(t.shape) for t in (layer.keys, layer.values)]
        keys, values = self.codec.decode(index, payload, *shapes, layer.positions, cache.layout)  # type: ignore[call-arg, arg-type]
        device = layer.keys.device
        return LayerCache(keys.to(device), values.to(device), layer.positions)

    def _evidence(self, source: Prefilled | KVCache) -> tuple[KVCache, Evidence]:
        if isinstance(source, Prefilled):
            return source.cache, source.evidence
        if self.requests:
            raise EvidenceError(
                f"{_name(self.selection)} ranks tokens by attention, which a bare cache does not hold; "
                f"pass what vlm.prefill(..., recipe={str(self)!r}) returned, or choose knorm, random, full or none"
            )
        return source, Evidence()


def compress(source: Prefilled | KVCache, recipe: str | Recipe) -> bytes:
    """Select, encode and write ``source`` as one bitstream.

    Raises
    ------
    RecipeError, EvidenceError
        See :meth:`Recipe.parse` and :meth:`Recipe.select`.
    InputError
        The cache holds NaN or infinity.
    """
    return b"".join(compress_frames(source, recipe))


def compress_frames(source: Prefilled | KVCache, recipe: str | Recipe) -> Iterator[bytes]:
    """The pieces of :func:`compress`, each as soon as it is ready: header, one frame per layer, trailer."""
    recipe = Recipe.parse(recipe)
    cache = recipe.keep(source)
    writer = Writer(recipe.codec, lossless=recipe.lossless == "zstd")
    yield writer.header(cache)
    for index, layer in enumerate(cache):
        yield writer.frame(index, layer)
    yield writer.trailer()


def decompress(blob: bytes, device: str | torch.device = "cpu") -> KVCache:
    """The cache in a bitstream, in bfloat16.

    Raises
    ------
    BitstreamError
        The bytes are truncated, corrupt, or of a newer version: :class:`~kvferry.errors.TruncatedError`,
        :class:`~kvferry.errors.CorruptError`, :class:`~kvferry.errors.VersionError`.
    """
    return decompress_stream(blob, device)


def _parse_selection(text: str) -> tuple[Any, float]:
    head, *options = text.split(",")
    name, at, number = (part.strip() for part in head.partition("@"))
    scorer = with_options(lookup(SCORERS, name, "selection")(), name, options)
    if name in WITHOUT_FRACTION:
        if at:
            raise RecipeError(f"{name} takes no fraction; leave out '@{number}'")
        return scorer, 1.0
    if not at:
        raise RecipeError(f"{name} needs the fraction of tokens to keep, for instance {name}@0.25")
    try:
        return scorer, float(number)
    except ValueError:
        raise RecipeError(f"{name}@{number}: a fraction is a number in (0, 1], for instance {name}@0.25") from None


def _name(selection: Scorer) -> str:
    for name, kind in SCORERS.items():
        if type(selection) is kind:
            return name
    raise RecipeError(f"{type(selection).__name__} is not in kvferry.selection.SCORERS; add it there")
