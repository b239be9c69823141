"""A learned capsule: some visual tokens' keys and a network for the rest, few components of their values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from kvferry.cache import PromptLayout
from kvferry.codecs.apart import SIDED
from kvferry.codecs.base import LIMIT, Shape
from kvferry.codecs.capsule_profile import CapsuleProfile, Way, neighbours
from kvferry.codecs.checks import check_finite, check_numbers, check_size
from kvferry.codecs.grammar import named_text, parse_named
from kvferry.codecs.grids import Index, pictures, plan
from kvferry.codecs.profile import DIGEST
from kvferry.codecs.profile_store import for_decoding, for_encoding
from kvferry.codecs.side import Side, What
from kvferry.errors import CorruptError, InputError
from kvferry.lazy import torch

_TABLE = {codec.name: codec for codec in SIDED}
_BOTH: tuple[What, What] = ("keys", "values")
RIDGE = 1e-3
"""Added to the components' inner products, which are about 1."""


@dataclass(frozen=True)
class Capsule:
    """``capsule:0.4@FILE,codec=int4``: of every picture 40 % of the keys, and components of the values in as many
    numbers; text as it is.

    After KVCapsule (arXiv 2605.16439), for visual tokens only, on the model as it is, asymmetric:

    * Keys: tokens spread evenly over the picture's grid keep theirs; a small network per layer rebuilds each of the
      others from the un-rotated keys of its four nearest kept ones and where those lie, and turns it to its own
      position, so that attention keeps its geometry.
    * Values: principal components along the *token* axis, calibrated; what is sent are their coefficients for each
      picture and channel. They are held as sums of cosines, so that pictures of every size share them.

    Text tokens, kept keys and coefficients are coded by ``codec``. All of a picture's tokens must be there: a capsule
    follows ``full``, or a selection of text only. A prompt without pictures is coded by ``codec`` alone. Decodes in
    float32 arithmetic to bfloat16.

    Each frame: the profile's digest (4 bytes), keys and values of text, keys of visual tokens, values of visual tokens.

    Parameters
    ----------
    share : float
        Of the tokens, above 0 and up to 1: of a picture of ``n`` tokens ``round(share * n)`` keys, at least one, and
        as many components.
    profile : str
        File by ``kvferry fit capsule``; by default the one that is here for the model. Whoever decodes finds it by the
        model's fingerprint and the file's digest, which are in the stream.
    codec : str
        One that writes keys and values each by itself: ``bf16``, ``int1`` to ``int8``, ``fp8``, ``kivi:B``,
        ``turbo:B``.
    keys, values : {"mlp", "pca", "interpolated", "full"}
        How each side is carried: by a network, by components, by the kept tokens' means by distance (what the network
        begins with, nothing learned), or as it is.
    """

    name: ClassVar[str] = "capsule"
    argument: ClassVar[str] = "share"

    share: float = 0.4
    profile: str = ""
    codec: str = "int8"
    keys: Way = "mlp"
    values: Way = "pca"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"capsule:{self.share:g}: a share lies above 0 and is at most 1")
        object.__setattr__(self, "codec", named_text(_TABLE, parse_named(_TABLE, self.codec)))

    @property
    def inner(self) -> Side:
        """What codes the numbers that are carried."""
        side: Side = parse_named(_TABLE, self.codec)
        return side

    def encoder(self, fingerprint: str) -> CapsuleCoder:
        """Encodes streams of the model with this fingerprint."""
        profile, digest = for_encoding(CapsuleProfile, self.profile, fingerprint)
        return CapsuleCoder(self, fingerprint, profile, digest)

    def decoder(self, fingerprint: str) -> CapsuleCoder:
        """Decodes streams of the model with this fingerprint."""
        return CapsuleCoder(self, fingerprint)

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Refused: only :meth:`encoder` knows the model, without which there is no profile."""
        return self.encoder("").encode(layer, keys, values, positions, layout)

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refused, as :meth:`encode` is."""
        return self.decoder("").decode(layer, payload, key_shape, value_shape, positions, layout)


class Picture(NamedTuple):
    """One picture of a frame.

    Parameters
    ----------
    rows, columns : int
    at : int64 ``[rows * columns]``
        Where its tokens stand among those of the frame.
    most : int
        How many of them, or of their components, are carried.
    """

    rows: int
    columns: int
    at: torch.Tensor
    most: int

    def carried(self, way: Way) -> int:
        """How many rows that makes."""
        return len(self.at) if way == "full" else self.most


class Part(NamedTuple):
    """One side of a frame's text, or of its pictures, as the inner codec has it: ``shape`` of so many bytes, and which
    row is which."""

    what: What
    shape: Shape
    order: torch.Tensor
    size: int
    pictures: list[Picture] | None


@dataclass
class CapsuleCoder:
    """Encodes or decodes one stream, each frame by itself; a decoder finds its profile by the first one's digest."""

    capsule: Capsule
    fingerprint: str
    profile: CapsuleProfile | None = None
    digest: bytes = field(default=b"")
    name: ClassVar[str] = Capsule.name

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Bytes of one layer.

        Raises
        ------
        InputError
            NaN or infinity, another shape than the profile's, pictures of a larger grid than it knows, or of which some
            tokens are not there.
        """
        profile = self.profile
        if profile is None:
            raise InputError("a decoder does not encode; use Capsule.encoder()")
        text, seen = self._parts(positions, layout)
        sides = dict(zip(_BOTH, (keys, values), strict=True))
        for what, tensor in sides.items():
            check_finite(layer, what, tensor)
            self._check_shape(profile, layer, (tensor.shape[0], tensor.shape[1], tensor.shape[2]))
        inner, out = self.capsule.inner, [self.digest]
        where = _places(positions, layout)
        for what, tensor in sides.items():
            out.append(inner.encode_side(layer, what, tensor[:, text], positions[:, text]))
        for what, tensor in sides.items():
            if seen:
                rows = [self._carried(profile, layer, what, tensor[:, x.at], where[:, x.at], x) for x in seen]
                carried = torch.cat(rows, 1)
                out.append(inner.encode_side(layer, what, carried, _order(carried)))
        return b"".join(out)

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in bfloat16."""
        if len(payload) < DIGEST:
            raise CorruptError(f"layer {layer}: a frame without its digest")
        if self.profile is None or payload[:DIGEST] != self.digest:
            self.profile = for_decoding(CapsuleProfile, self.fingerprint, payload[:DIGEST])
            self.digest = payload[:DIGEST]
        profile, inner = self.profile, self.capsule.inner
        shapes: dict[What, Shape] = {"keys": key_shape, "values": value_shape}
        try:
            for shape in shapes.values():
                self._check_shape(profile, layer, shape)
            text, seen = self._parts(positions, layout)
            parts = self._sizes(profile, shapes, positions[:, text], seen)
        except InputError as error:
            raise CorruptError(f"layer {layer}: no encoder writes such a frame: {error}") from None
        check_size(layer, payload, DIGEST + sum(part.size for part in parts))
        octets = np.frombuffer(payload, np.uint8)[DIGEST:]
        out = {what: torch.empty(shape, dtype=torch.bfloat16) for what, shape in shapes.items()}
        where = _places(positions, layout)
        for part in parts:
            rows = inner.decode_side(part.what, octets[: part.size], part.shape, part.order)
            octets = octets[part.size :]
            if part.pictures is None:
                out[part.what][:, text] = rows
                continue
            counts = [x.carried(self._way(part.what)) for x in part.pictures]
            for picture, some in zip(part.pictures, torch.split(rows, counts, 1), strict=True):
                rebuilt = self._rebuilt(profile, layer, part.what, some.float(), where[:, picture.at], picture)
                out[part.what][:, picture.at] = rebuilt.clamp(-LIMIT, LIMIT).bfloat16()
        check_numbers(layer, keys=out["keys"], values=out["values"])
        return out["keys"], out["values"]

    def _sizes(
        self, profile: CapsuleProfile, shapes: dict[What, Shape], text: torch.Tensor, seen: list[Picture]
    ) -> list[Part]:
        """What a frame holds after its digest."""
        inner, parts = self.capsule.inner, list[Part]()
        for what, (heads, _, dim) in shapes.items():
            shape = heads, text.shape[1], dim
            parts.append(Part(what, shape, text, inner.side_size(what, shape, text), None))
        for what, (heads, _, dim) in shapes.items() if seen else ():
            way = self._way(what)
            profile.check(what, way)
            for picture in seen if way == "pca" else ():
                profile.check_grid(what, picture.rows, picture.columns, picture.most)
            shape = heads, sum(x.carried(way) for x in seen), dim
            parts.append(Part(what, shape, _rows(shape), inner.side_size(what, shape, _rows(shape)), seen))
        return parts

    def _way(self, what: What) -> Way:
        return self.capsule.keys if what == "keys" else self.capsule.values

    def _carried(
        self, profile: CapsuleProfile, layer: int, what: What, x: torch.Tensor, where: torch.Tensor, picture: Picture
    ) -> torch.Tensor:
        """What is sent of a picture's rows ``[heads, n, dim]``: ``[heads, carried, dim]``."""
        way = self._way(what)
        profile.check(what, way)
        if way == "full":
            return x
        if way != "pca":
            return x[:, plan(picture.rows, picture.columns, picture.most).kept.to(x.device)]
        profile.check_grid(what, picture.rows, picture.columns, picture.most)
        basis = profile.basis(what, layer, picture.rows, picture.columns, picture.most).to(x.device)
        off = _turned(profile, layer, what, x.float(), where, forwards=False)
        off = off - profile.means[what][layer].view(len(x), 1, -1).to(x.device)
        return _coefficients(basis, off)

    def _rebuilt(
        self, profile: CapsuleProfile, layer: int, what: What, x: torch.Tensor, where: torch.Tensor, picture: Picture
    ) -> torch.Tensor:
        """A picture's rows ``[heads, n, dim]`` from what was sent of them, in float32."""
        way = self._way(what)
        if way == "full":
            return x
        mean = profile.means[what][layer]
        heads, _, dim = x.shape
        if way == "pca":
            basis = profile.basis(what, layer, picture.rows, picture.columns, picture.most)
            return _turned(profile, layer, what, basis @ x + mean.view(heads, 1, dim), where, forwards=True)
        how, scale = plan(picture.rows, picture.columns, picture.most), profile.deviations[what][layer]
        straight = _turned(profile, layer, what, x, where[:, how.kept], forwards=False)
        kept = ((straight.permute(1, 0, 2).flatten(1) - mean) / scale)[None]
        if way == "mlp":
            found = profile.networks[what].rebuilt(kept, how, slice(layer, layer + 1))[0]
        else:
            found = neighbours(kept, how)[1][0]
        absent = (found * scale + mean).view(-1, heads, dim).permute(1, 0, 2)
        out = x.new_empty(heads, len(picture.at), dim)
        out[:, how.kept] = x
        out[:, how.absent] = _turned(profile, layer, what, absent, where[:, how.absent], forwards=True)
        return out

    def _parts(self, positions: torch.Tensor, layout: PromptLayout) -> tuple[torch.Tensor, list[Picture]]:
        """Where the text of a frame stands in it, and its pictures."""
        index: Index = positions[:1].cpu().numpy()[0]
        if not bool((positions == positions[:1]).all()) or (len(index) > 1 and bool((np.diff(index) <= 0).any())):
            raise InputError(
                "a capsule codes all heads of a picture's tokens together, but heads keep different tokens; use "
                "full|capsule, or add budget=shared and keep all visual tokens"
            )
        there = layout.visual[index]
        text = torch.from_numpy(np.flatnonzero(~there))
        return text, list(self._pictures(index, layout)) if there.any() else []

    def _pictures(self, index: Index, layout: PromptLayout) -> Iterator[Picture]:
        at = np.full(len(layout), -1, np.int64)
        at[index] = np.arange(len(index))
        for rows, columns, tokens in pictures(layout):
            mine = at[tokens]
            if bool((mine < 0).all()):
                continue
            if bool((mine < 0).any()):
                raise InputError(
                    f"{int((mine < 0).sum())} of a picture's {len(mine)} tokens were evicted, or travel in another "
                    "tier, and a capsule codes all of them together; use full|capsule in one tier, and a smaller share "
                    "instead of a selection"
                )
            count = max(1, round(self.capsule.share * len(mine)))
            yield Picture(rows, columns, torch.from_numpy(mine), count)

    def _check_shape(self, profile: CapsuleProfile, layer: int, shape: Shape) -> None:
        layers, heads, dim = profile.shape
        if layer >= layers or (shape[0], shape[2]) != (heads, dim):
            raise InputError(
                f"layer {layer} of {shape[0]} heads and {shape[2]} channels does not fit a profile for {layers} layers "
                f"of {heads} heads and {dim} channels"
            )


def _coefficients(basis: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """Least squares: ``c`` ``[heads, r, dim]`` so that ``basis @ c`` is nearest to ``off`` ``[heads, n, dim]``.

    On grids smaller than the profile's, the components are not quite orthonormal, and some may be next to nothing.
    """
    gram = basis.double().T @ basis.double()
    gram.diagonal().add_(RIDGE)
    found: torch.Tensor = torch.linalg.solve(gram, basis.double().T @ off.double()).float()
    return found


def _turned(
    profile: CapsuleProfile, layer: int, what: What, x: torch.Tensor, where: torch.Tensor, *, forwards: bool
) -> torch.Tensor:
    """Keys turned to their positions (``[axes, n]``) or back; values as they are."""
    way = profile.rotary[layer] if what == "keys" else None
    if way is None:
        return x
    return way.rotate(x, where) if forwards else way.unrotate(x, where)


def _places(positions: torch.Tensor, layout: PromptLayout) -> torch.Tensor:
    """Rotary positions of a frame's tokens, int64 ``[axes, kept]``."""
    return torch.from_numpy(layout.positions[:, positions[:1].cpu().numpy()[0]].astype(np.int64))


def _order(rows: torch.Tensor) -> torch.Tensor:
    """Which row is which, int64 ``[heads, n]``, of what stands for no tokens."""
    return _rows((rows.shape[0], rows.shape[1], rows.shape[2]))


def _rows(shape: Shape) -> torch.Tensor:
    return torch.arange(shape[1]).expand(shape[0], -1)
