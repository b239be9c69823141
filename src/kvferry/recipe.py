"""Selection + codec by name: ``compress()`` and ``decompress()``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

from kvferry.bitstream import Writer, decompress_stream
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import (
    BF16,
    AnyCodec,
    Codec,
    JointCoder,
    codec_text,
    decoder_of,
    encoder_of,
    for_stage,
    parse_codec,
    stack,
)
from kvferry.codecs.grammar import lookup, name_of, number_text, option_text, parse_part, part_text, with_options
from kvferry.errors import BudgetError, EvidenceError, InputError, RecipeError
from kvferry.evidence import Evidence, EvidenceRequest, Prefilled
from kvferry.lazy import torch
from kvferry.presets import recipe_text
from kvferry.selection import (
    BUDGETS,
    MERGES,
    POLICIES,
    SCORERS,
    Budget,
    Importance,
    Merge,
    Order,
    Policy,
    Scorer,
    Selection,
    choose,
    evict,
    in_tiers,
    least_count,
)

LOSSLESS = ("zstd",)
_PARTS: dict[str, dict[str, type[Any]]] = {"budget": BUDGETS, "modality": POLICIES, "merge": MERGES}
_DEFAULTS = {"budget": BUDGETS["uniform"](), "modality": POLICIES["uniform"](), "merge": None}


@dataclass(frozen=True)
class Recipe:
    """Which tokens stay, in how few bits, and whether a lossless stage follows.

    Its text is ``selection[@fraction][,option=value...] | codec[,option=value...] [| zstd]``, for instance
    ``q2c@0.25|int8`` or ``snapkv@0.1,window=16,budget=head,merge=lookm|int4|zstd``. ``str()`` gives the canonical form:
    no spaces, no option that is at its default; ``Recipe.parse(str(recipe)) == recipe``.

    Parameters
    ----------
    selection
        A scorer: one of the dataclasses in :data:`kvferry.selection.SCORERS`.
    fraction : float
        Of the prompt's tokens, per layer; exact to a token. 1 for ``full`` and ``none``, which take none, and where
        ``bytes`` decides.
    codec
        One of :data:`kvferry.codecs.CODECS`; BF16 where the text names none.
    lossless : str or None
        ``"zstd"`` compresses every payload that gets smaller by it.
    budget, modality, merge
        How layers or heads share the tokens, what each modality is owed, and what becomes of evicted tokens: from
        ``BUDGETS``, ``POLICIES`` and ``MERGES`` in :mod:`kvferry.selection`.
    bytes : int or None
        Instead of a fraction (``q2c,bytes=20000|int4``): as many tokens as make a whole bitstream of at most so many
        bytes.
    """

    selection: Scorer
    fraction: float = 1.0
    codec: AnyCodec = field(default_factory=BF16)
    lossless: str | None = None
    budget: Budget = field(default_factory=BUDGETS["uniform"])
    modality: Policy = field(default_factory=POLICIES["uniform"])
    merge: Merge | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise RecipeError(
                f"the fraction of kept tokens must lie in (0, 1], not {self.fraction:g}; "
                "q2c@0.25 keeps a quarter, none|bf16 drops every visual token"
            )
        if self.bytes is not None and (self.bytes < 1 or self.fraction != 1.0):
            raise RecipeError("bytes=N is a positive number that stands instead of a fraction, as in q2c,bytes=20000")
        if _decides(self.selection):
            self._check_fixed()
        if self.lossless is not None:
            lookup(dict.fromkeys(LOSSLESS), self.lossless, "lossless stage")

    def _check_fixed(self) -> None:
        """``full`` and ``none`` leave nothing to choose."""
        name = _name(self.selection)
        if self.fraction != 1.0:
            raise RecipeError(f"{name} takes no fraction; leave out '@{self.fraction:g}'")
        if self.bytes is not None or type(self.budget) is not BUDGETS["uniform"]:
            raise RecipeError(f"{name} takes no budget and no bytes: what it keeps is fixed; leave them out")
        if type(self.modality) is not POLICIES["uniform"]:
            raise RecipeError(f"{name} takes no modality policy: what it keeps is fixed; leave it out")
        if name == "full" and self.merge is not None:
            raise RecipeError("full evicts nothing that could be merged; leave out the merge")

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """The recipe in ``text``, or that of one of the :mod:`kvferry.presets`.

        A :class:`~kvferry.errors.RecipeError` says what is wrong and what exists.
        """
        if isinstance(text, Recipe):
            return text
        text = recipe_text(text)
        parts = [part.strip() for part in text.split("|")]
        if len(parts) > 3 or not all(parts):
            raise RecipeError(
                f"{text!r} is not a recipe; write selection[@fraction][,option=value] | codec [| zstd], "
                "for instance q2c@0.25|int8"
            )
        codec = parse_codec(parts[1]) if len(parts) > 1 else BF16()
        lossless = parts[2] if len(parts) > 2 else None
        return cls(**_parse_selection(parts[0]), codec=codec, lossless=lossless)

    def __str__(self) -> str:
        name = _name(self.selection)
        fraction = "" if _decides(self.selection) or self.bytes is not None else f"@{number_text(self.fraction)}"
        options = option_text(self.selection, SCORERS[name]())
        for key, table in _PARTS.items():
            part = getattr(self, key)
            if part != _DEFAULTS[key]:
                options += f",{key}={part_text(table, part)}"
        if self.bytes is not None:
            options += f",bytes={self.bytes}"
        return "|".join([name + fraction + options, codec_text(self.codec), *filter(None, [self.lossless])])

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """What prefill must observe of attention for this recipe."""
        wanted = (*self.selection.requests, *self.budget.requests, *self.modality.requests)
        return tuple(dict.fromkeys(wanted))

    def select(self, source: Prefilled | KVCache) -> Selection:
        """The tokens to keep.

        Raises
        ------
        EvidenceError
            The recipe needs attention and ``source`` is a bare cache, or prefill was not asked to observe it.
        BudgetError
            What must stay does not fit the fraction, or not even the smallest bitstream fits ``bytes``.
        InputError
            The cache was pruned before, so that its tokens cannot be ranked again.
        """
        return self._select(source, self.fraction if self.bytes is None else self._largest_fraction(source))

    def _select(self, source: Prefilled | KVCache, fraction: float) -> Selection:
        cache, evidence = self._evidence(source)
        if _decides(self.selection):
            chosen: Selection = self.selection.select(cache, evidence)  # type: ignore[attr-defined]
            return chosen
        if any(layer.per_head != (cache.length,) * layer.heads for layer in cache):
            raise InputError(
                f"this cache was already pruned ({cache.recipe}) and cannot be ranked again; "
                f"use full|{codec_text(self.codec)}"
            )
        return choose(cache, evidence, self.selection, self.budget, self.modality, fraction)

    def keep(self, source: Prefilled | KVCache) -> KVCache:
        """The cache with only the selected tokens, nothing quantized; it carries this recipe's name."""
        return self.rank(source)[0]

    def rank(self, source: Prefilled | KVCache, tiers: int = 1) -> tuple[KVCache, Importance | None]:
        """What :meth:`keep` gives, and how important each of its tokens is; ``None`` where all are alike.

        ``tiers`` matters where ``bytes`` decides: a stream of more frames has less room for tokens.
        """
        return self._rank(source, self.fraction if self.bytes is None else self._largest_fraction(source, tiers))

    def _rank(self, source: Prefilled | KVCache, fraction: float) -> tuple[KVCache, Importance | None]:
        cache = source.cache if isinstance(source, Prefilled) else source
        if _name(self.selection) == "full":
            return replace(cache, recipe=str(self)), None
        selection = self._select(source, fraction)
        kept = evict(cache, selection)
        layers = kept.layers if self.merge is None else self.merge.merge(cache, kept)
        return replace(kept, layers=layers, recipe=str(self)), selection.importance

    def _largest_fraction(self, source: Prefilled | KVCache, tiers: int = 1) -> float:
        """Of the tokens whose whole bitstream fits ``bytes``, by bisection on real encodes.

        Bisection takes sizes to grow with the number of tokens. They do, but for a few bytes of positions and zstd.
        """
        cache, most = self._evidence(source)[0], self.bytes or 0
        low, high = least_count(self.modality, cache.layout.visual[: cache.length]), cache.length
        if (smallest := self._size(source, low / cache.length, tiers)) > most:
            while (size := replace(self, bytes=smallest)._size(source, low / cache.length, tiers)) > smallest:
                smallest = size  # the recipe stands in the header, and a larger number may be longer
            raise BudgetError(
                f"the smallest bitstream of {self} takes {smallest} bytes for this prompt, {low} tokens per layer; "
                "allow that many, or choose a codec of fewer bits"
            )
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._size(source, middle / cache.length, tiers) <= most
            low, high = (middle, high) if fits else (low, middle - 1)
        return low / cache.length

    def _size(self, source: Prefilled | KVCache, fraction: float, tiers: int) -> int:
        """Bytes of the whole bitstream with so large a share of the tokens."""
        kept, importance = self._rank(source, fraction)
        return sum(map(len, write_frames(kept, self, importance, tiers)))

    def apply(self, source: Prefilled | KVCache) -> KVCache:
        """What ``decompress(compress(source, self))`` gives, without the bytes in between."""
        cache = self.keep(source)
        codec = for_stage(self.codec, self.lossless is not None)
        encoder = encoder_of(codec, cache.fingerprint, len(cache.layers))
        decoder = decoder_of(codec, cache.fingerprint)
        if isinstance(encoder, JointCoder) and isinstance(decoder, JointCoder):
            return replace(cache, layers=_joint_round_trip(encoder, decoder, cache))
        layers = (_round_trip(encoder, decoder, i, x, cache.layout) for i, x in enumerate(cache))  # type: ignore[arg-type]
        return replace(cache, layers=tuple(layers))

    def _evidence(self, source: Prefilled | KVCache) -> tuple[KVCache, Evidence]:
        if isinstance(source, Prefilled):
            return source.cache, source.evidence
        if self.requests:
            raise EvidenceError(
                f"{self} looks at attention, which a bare cache does not hold; "
                f"pass what vlm.prefill(..., recipe={str(self)!r}) returned, or choose knorm, random, full or none"
            )
        return source, Evidence()


def compress(source: Prefilled | KVCache, recipe: str | Recipe, tiers: int = 1, order: Order = "importance") -> bytes:
    """Select, encode and write ``source`` as one bitstream.

    Parameters
    ----------
    tiers : int
        In how many parts each layer's tokens travel, 1 to 64, the most important first. Once the first tier has
        arrived, :meth:`kvferry.bitstream.Reader.partial` has a cache.
    order : {"importance", "layer", "token"}
        See :func:`kvferry.selection.in_tiers`.

    Raises
    ------
    RecipeError, EvidenceError, BudgetError
        See :meth:`Recipe.parse` and :meth:`Recipe.select`.
    InputError
        The cache holds NaN or infinity, or there are no such tiers.
    """
    out = BytesIO()  # joined, all pieces would be there twice
    for piece in compress_frames(source, recipe, tiers, order):
        out.write(piece)
    return out.getvalue()


def compress_frames(
    source: Prefilled | KVCache, recipe: str | Recipe, tiers: int = 1, order: Order = "importance"
) -> Iterator[bytes]:
    """The pieces of :func:`compress`, each as soon as it is ready: header, frames, trailer."""
    recipe = Recipe.parse(recipe)
    kept, importance = recipe.rank(source, tiers)
    yield from write_frames(kept, recipe, importance, tiers, order)


def write_frames(
    kept: KVCache,
    recipe: Recipe,
    importance: Importance | None = None,
    tiers: int = 1,
    order: Order = "importance",
) -> Iterator[bytes]:
    """The pieces of a bitstream of what :meth:`Recipe.rank` gave."""
    writer = Writer(recipe.codec)
    yield writer.header(kept, tiers)
    parts = in_tiers(kept, importance, tiers, order)
    if writer.joint:
        if order == "layer":
            raise InputError(f"{recipe.codec.name} codes all layers together; order tokens by importance or token")
        for together in zip(*[parts] * len(kept.layers), strict=True):
            yield writer.joint_frame([tier.tokens for tier in together], together[0].more)
    else:
        for layer, tokens, more in parts:
            yield writer.frame(layer, tokens, more)
    yield writer.trailer()


def decompress(blob: bytes, device: str | torch.device = "cpu") -> KVCache:
    """The cache in a bitstream, in bfloat16.

    Raises
    ------
    BitstreamError
        The bytes are truncated, corrupt, or of a newer version: :class:`~kvferry.errors.TruncatedError`,
        :class:`~kvferry.errors.CorruptError`, :class:`~kvferry.errors.VersionError`.

    See Also
    --------
    kvferry.bitstream.Reader : decodes while bytes arrive, and what has arrived of a stream in tiers.
    kvferry.decompress_layers : some layers only.
    """
    return decompress_stream(blob, device)


def _parse_selection(text: str) -> dict[str, Any]:
    """What the part of a recipe before the first bar says, by the names of :class:`Recipe`'s fields."""
    head, *options = text.split(",")
    name, at, number = (part.strip() for part in head.partition("@"))
    default = lookup(SCORERS, name, "selection")()
    given, own = _recipe_options(name, options)
    given["selection"] = with_options(default, name, own, also=[*_PARTS, "bytes"])
    if _decides(default):
        if at:
            raise RecipeError(f"{name} takes no fraction; leave out '@{number}'")
    elif at:
        given["fraction"] = _fraction(name, number)
        if "bytes" in given:
            raise RecipeError(f"{name} takes a fraction or bytes, not both; leave out '@{number}'")
    elif "bytes" not in given:
        raise RecipeError(f"{name} needs the fraction of tokens to keep, for instance {name}@0.25")
    return given


def _recipe_options(name: str, options: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The options that belong to the recipe, by name, and those left for the scorer."""
    given: dict[str, Any] = {}
    own = []
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or key not in (*_PARTS, "bytes"):
            own.append(option)
        elif key in given:
            raise RecipeError(f"{name}: the option {key!r} is given twice")
        elif key == "bytes":
            given[key] = _whole(value)
        else:
            given[key] = parse_part(_PARTS[key], value, key)
    return given, own


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"bytes={text}: a size is a whole number of bytes, for instance bytes=20000") from None


def _fraction(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"{name}@{text}: a fraction is a number in (0, 1], for instance {name}@0.25") from None


def _round_trip(encoder: Codec, decoder: Codec, index: int, layer: LayerCache, layout: PromptLayout) -> LayerCache:
    payload = encoder.encode(index, layer.keys, layer.values, layer.positions, layout)
    shapes = (_shape(layer.keys), _shape(layer.values))
    keys, values = decoder.decode(index, payload, *shapes, layer.positions, layout)
    device = layer.keys.device
    return LayerCache(keys.to(device), values.to(device), layer.positions, layer.counts)


def _joint_round_trip(encoder: JointCoder, decoder: JointCoder, cache: KVCache) -> tuple[LayerCache, ...]:
    stacked, values, positions = stack(cache.layers)
    payload = encoder.encode_tokens(stacked, values, positions, cache.layout)
    decoded = decoder.decode_tokens(payload, tuple(stacked.shape), positions, cache.layout)  # type: ignore[arg-type]
    device = stacked.device
    return tuple(LayerCache(k.to(device), v.to(device), x.positions) for k, v, x in zip(*decoded, cache, strict=True))


def _shape(tensor: torch.Tensor) -> tuple[int, int, int]:
    rows, kept, channels = tensor.shape
    return rows, kept, channels


def _decides(selection: Scorer) -> bool:
    """Whether the selection says itself what stays, whatever the budget."""
    return hasattr(selection, "select")


def _name(selection: Scorer) -> str:
    return name_of(SCORERS, selection)
