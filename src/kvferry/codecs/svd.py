"""Truncated singular value decomposition, visual tokens and text apart."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from kvferry.cache import PromptLayout
from kvferry.codecs.base import LIMIT, Shape
from kvferry.codecs.checks import check_finite
from kvferry.codecs.levels import by_channel, quantize, restore
from kvferry.codecs.packing import pack, packed_size, unpack
from kvferry.codecs.profile import DIGEST, TransformProfile
from kvferry.codecs.profile_store import for_decoding, for_encoding
from kvferry.errors import CorruptError, InputError
from kvferry.lazy import torch

Numbers = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_]
_HEAD = struct.Struct("<Hf")
_DIRECT = 0xFFFF


@dataclass(frozen=True)
class SVD:
    """``X = U S V^T`` cut to ``rank`` components, for ``X`` one layer's keys, or values, of one modality.

    ``X`` is ``[tokens, kv_heads * head_dim]`` where all heads keep the same tokens, and one matrix per head where they
    do not. What is sent are ``U S`` and ``V^T`` in integers of ``bits``, one scale per component (:class:`Integer`'s
    quantizer over the tokens, or the channels). A matrix whose own integers (a scale per token) are no longer than its
    factors is sent as those; so is one whose rank is too small to cut.

    Keys are decomposed as they lie in the cache, turned by their rotary positions, for a codec does not know the
    model's frequencies. With ``keys=unturned`` it takes them from the model's ``transform`` profile, and turns keys
    back first. No mean is subtracted: where keys have large constant channels, one component holds them.

    Bytes: for each matrix (keys, then values; visual tokens, then text) its rank (uint16, 65535 for none) and largest
    magnitude (float32), scales (bfloat16) and numbers, packed.

    Parameters
    ----------
    rank : int
        At most so many components.
    energy : float
        Instead, as many components as hold this share of the sum of squares; 0 for a fixed rank.
    bits : int
        Of the factors' numbers, 2 to 8.
    keys : {"turned", "unturned"}
        How keys are decomposed.
    """

    name: ClassVar[str] = "svd"
    argument: ClassVar[str] = "rank"

    rank: int = 16
    energy: float = 0.0
    bits: int = 8
    keys: Literal["turned", "unturned"] = "turned"

    def __post_init__(self) -> None:
        if not 1 <= self.rank < _DIRECT or not 0 <= self.energy <= 1 or not 2 <= self.bits <= 8:
            raise InputError("svd needs a rank from 1, an energy from 0 to 1 (svd,energy=0.95) and 2 to 8 bits")

    def encoder(self, fingerprint: str) -> SVD | Unturned:
        """See :class:`~kvferry.codecs.base.Codec`. Raises :class:`~kvferry.errors.InputError` without a profile."""
        if self.keys == "turned":
            return self
        return Unturned(self, fingerprint, *for_encoding(TransformProfile, "", fingerprint))

    def decoder(self, fingerprint: str) -> SVD | Unturned:
        """See :class:`~kvferry.codecs.base.Codec`."""
        return self if self.keys == "turned" else Unturned(self, fingerprint)

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Raises :class:`~kvferry.errors.InputError` on NaN, infinity, or what bfloat16 cannot hold."""
        out = []
        for what, tensor in (("keys", keys), ("values", values)):
            check_finite(layer, what, tensor)
            tokens = tensor.double().cpu()
            for heads, mask in _matrices(positions, layout):
                out.append(self._encode(layer, what, tokens[heads][:, mask]))
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
        rest, out = memoryview(payload), []
        for shape in (key_shape, value_shape):
            tokens = torch.zeros(shape, dtype=torch.bfloat16)
            for heads, mask in _matrices(positions, layout):
                part = tokens[heads]
                part[:, mask], rest = self._decode(layer, rest, (len(part), int(mask.sum()), shape[2]))
            out.append(tokens)
        if len(rest):
            raise CorruptError(f"layer {layer}: {len(rest)} bytes more than its matrices need")
        return out[0], out[1]

    def _encode(self, layer: int, what: str, tokens: torch.Tensor) -> bytes:
        """One matrix, ``[heads, n, d]`` with ``n`` not 0."""
        heads, n, dim = tokens.shape
        peak = float(tokens.abs().max()) or 1.0
        flat = (tokens / peak).permute(1, 0, 2).reshape(n, heads * dim)
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        rank = min(self.rank, len(s)) if not self.energy else _rank_of(s, self.energy)
        if self._size(rank, n, heads, dim) >= self._size(_DIRECT, n, heads, dim):
            return _HEAD.pack(_DIRECT, 0.0) + self._integers(layer, what, tokens)
        factors = ((u[:, :rank] * s[:rank]).T[None], vh[None, :rank])
        return _HEAD.pack(rank, peak) + b"".join(self._integers(layer, what, x) for x in factors)

    def _integers(self, layer: int, what: str, vectors: torch.Tensor) -> bytes:
        """Scales, then numbers, of vectors ``[heads, n, d]``."""
        scales, numbers = quantize(layer, what, vectors, self.bits)
        return scales.astype("<u2").tobytes() + pack(by_channel(numbers).reshape(-1), self.bits).tobytes()

    def _decode(self, layer: int, rest: memoryview, shape: Shape) -> tuple[torch.Tensor, memoryview]:
        """One matrix, and what follows it."""
        heads, n, dim = shape
        if len(rest) < _HEAD.size:
            raise CorruptError(f"layer {layer}: a matrix without a rank")
        rank, peak = _HEAD.unpack_from(rest)
        size = self._size(rank, n, heads, dim)
        if not math.isfinite(peak) or (rank != _DIRECT and not 1 <= rank <= min(n, heads * dim)) or len(rest) < size:
            raise CorruptError(f"layer {layer}: a matrix of {n} tokens and rank {rank} in {len(rest)} bytes")
        body, rest = rest[_HEAD.size : size], rest[size:]
        if rank == _DIRECT:
            return self._vectors(body, shape), rest
        cut = self._bytes(1, rank, n)
        u, v = self._vectors(body[:cut], (1, rank, n)), self._vectors(body[cut:], (1, rank, heads * dim))
        tokens = (u[0].double().T @ v[0].double()) * peak
        tokens = tokens.clamp(-LIMIT, LIMIT).reshape(n, heads, dim)
        return tokens.permute(1, 0, 2).to(torch.bfloat16), rest

    def _vectors(self, body: memoryview, shape: Shape) -> torch.Tensor:
        heads, n, dim = shape
        words = np.frombuffer(body, "<u2", heads * n).astype(np.uint16)
        packed = np.frombuffer(body, np.uint8, offset=2 * heads * n)
        channels = unpack(packed, self.bits, heads * n * dim).reshape(heads, dim, n)
        return restore(words, by_channel(channels), self.bits, shape)

    def _bytes(self, heads: int, n: int, dim: int) -> int:
        return 2 * heads * n + packed_size(heads * n * dim, self.bits)

    def _size(self, rank: int, n: int, heads: int, dim: int) -> int:
        """Bytes of one matrix."""
        if rank == _DIRECT:
            return _HEAD.size + self._bytes(heads, n, dim)
        return _HEAD.size + self._bytes(1, rank, n) + self._bytes(1, rank, heads * dim)


@dataclass(frozen=True)
class Unturned:
    """:class:`SVD` of keys as they would lie at position 0. Each frame begins with the profile's digest (4 bytes)."""

    svd: SVD
    fingerprint: str
    profile: TransformProfile | None = None
    digest: bytes = b""
    name: ClassVar[str] = "svd"

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """See :meth:`SVD.encode`. Raises :class:`~kvferry.errors.InputError` where the profile is for other layers."""
        if self.profile is None:
            raise InputError("a decoder does not encode; use SVD.encoder()")
        check_finite(layer, "keys", keys)
        if not _fits(self.profile, layer, tuple(keys.shape)):
            raise InputError(f"layer {layer}: keys of {list(keys.shape)} do not fit a profile for {self.profile.shape}")
        turn = self.profile.rotary[layer]
        back = turn.unrotate(keys.float(), _where(layout, positions)) if turn else keys
        return self.digest + self.svd.encode(layer, back, values, positions, layout)

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`SVD.decode`. Raises :class:`~kvferry.errors.FingerprintError` where the profile is not here."""
        if len(payload) < DIGEST:
            raise CorruptError(f"layer {layer}: a frame without the digest of its profile")
        profile = for_decoding(TransformProfile, self.fingerprint, payload[:DIGEST])
        if not _fits(profile, layer, key_shape):
            raise CorruptError(f"layer {layer}: keys of {list(key_shape)} do not fit their profile")
        turn = profile.rotary[layer]
        keys, values = self.svd.decode(layer, payload[DIGEST:], key_shape, value_shape, positions, layout)
        return turn.rotate(keys, _where(layout, positions)) if turn else keys, values


def _fits(profile: TransformProfile, layer: int, shape: Sequence[int]) -> bool:
    """Whether the profile is for keys of this layer."""
    return layer < profile.shape[0] and shape[2] == profile.shape[2]


def _where(layout: PromptLayout, positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions of the entries, ``[1 or 3, kv_heads, kept]``."""
    return torch.from_numpy(layout.positions.astype(np.int64))[:, positions.cpu()]


def _rank_of(s: torch.Tensor, energy: float) -> int:
    """The fewest components with that share of the sum of squares, at least 1."""
    share = s.square().cumsum(0) / s.square().sum().clamp(min=1e-300)
    return min(int((share < energy - 1e-12).sum()) + 1, len(s))


def _matrices(positions: torch.Tensor, layout: PromptLayout) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which heads and which of their tokens make up each matrix; visual tokens first. None is empty."""
    visual = torch.from_numpy(layout.visual)[positions.cpu()]
    together = bool((positions == positions[:1]).all())
    heads = [slice(0, len(positions))] if together else [slice(i, i + 1) for i in range(len(positions))]
    for which in heads:
        for mask in (visual[which.start], ~visual[which.start]):
            if bool(mask.any()):
                yield which, mask
