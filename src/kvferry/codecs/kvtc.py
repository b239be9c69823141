"""KVTC: plain principal axes of all layers together, and a width for every group of coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np

from kvferry.cache import PromptLayout
from kvferry.codecs.bf16 import BF16
from kvferry.codecs.checks import check_numbers, check_size, check_tokens, warn_beyond
from kvferry.codecs.fp8 import FP8
from kvferry.codecs.groups import ERROR, Group, dequantize, plan, quantize
from kvferry.codecs.packing import Bytes
from kvferry.codecs.profile import DIGEST, Axes, PlainProfile, from_rows, to_rows
from kvferry.codecs.profile_store import for_decoding, for_encoding
from kvferry.codecs.side import Side, What, from_words, to_words
from kvferry.errors import CorruptError, InputError
from kvferry.lazy import torch

SINKS = 4
_BOTH: tuple[What, What] = ("keys", "values")


@dataclass(frozen=True)
class KVTC:
    """A token's un-rotated keys of all layers and heads as one vector, its values as another: their calibrated means
    taken off, turned to principal axes, and every group of axes in as many bits as a dynamic program gives it.

    K. Staniszewski and A. Lancucki, "KV Cache Transform Coding for Compact Storage in LLM Inference"
    (arXiv 2511.01815), as a baseline for :class:`~kvferry.codecs.transform.Transform`. Add ``| zstd`` for the paper's
    lossless stage (which is DEFLATE there).

    Groups are of 1, 16, 64, 256 or 1024 axes and of type none, 2-bit or 4-bit integer, or FP8 (e4m3); each has a scale
    and a shift of 16 bits per frame. The program
    (:func:`~kvferry.codecs.groups.plan`) minimises the expected squared error at no more than
    ``16 / ratio`` bits a number, scales and shifts included, for keys and for values each.

    Where this departs from the paper:

    * The program takes the expected error from calibrated variances, so that both ends run it for any number of
      tokens and any ratio, and no plan is sent or stored. In a group the largest variance counts.
    * There is no window of recent tokens in 16 bits unless ``window`` asks for it; the paper has 128, more than half of
      a prompt of 200 tokens. On validation questions of the testbed a window of 8 is no better at equal KL on full
      caches, and worse on pruned ones. It counts prompt tokens from the end, with the one that is fed again.
    * Integers' bounds are drawn in towards the mean where that makes the error smaller; the paper does not say.

    As in the paper, the ratio is that of the tokens between the sinks (the first four, in FP8) and the window, before
    the lossless stage. All layers and heads must keep the same tokens. Decodes in float32 arithmetic to bfloat16.

    Parameters
    ----------
    ratio : float
        16 over the bits a number takes. No axis takes more than 8, so that with few axes no small ratio can be reached
        (:meth:`reachable`); one that is asked for is warned about.
    profile : str
        File by ``kvferry calibrate --kind kvtc``; by default the one that is here for the model.
    window : int
        So many of the prompt's last tokens stay in bfloat16, if they are kept at all.
    """

    name: ClassVar[str] = "kvtc"
    argument: ClassVar[str] = "ratio"

    ratio: float = 16.0
    profile: str = ""
    window: int = 0

    def __post_init__(self) -> None:
        if not 1.0 <= self.ratio <= 1e5 or self.window < 0:
            raise InputError("kvtc needs a ratio from 1 to 100000 and a window of 0 tokens or more")

    def encoder(self, fingerprint: str) -> KVTCCoder:
        """Encodes streams of the model with this fingerprint."""
        profile, digest = for_encoding(PlainProfile, self.profile, fingerprint)
        warn_beyond(self.name, self.ratio, self.reachable(profile))
        return KVTCCoder(self, fingerprint, profile, digest)

    def decoder(self, fingerprint: str) -> KVTCCoder:
        """Decodes streams of the model with this fingerprint."""
        return KVTCCoder(self, fingerprint)

    @staticmethod
    def reachable(profile: PlainProfile) -> tuple[float, float]:
        """The least ratio and the largest: all axes in 8 bits, and one in 2, for many tokens.

        Below the first nothing more is coded, above the second only means are left.
        """
        sides = (profile.keys, profile.values)
        least = max(16 * len(axes.mean) / (max(ERROR) * len(axes.octaves)) for axes in sides)
        return least, 16 * len(profile.keys.mean) / min(ERROR)


@dataclass
class KVTCCoder:
    """Encodes or decodes one stream.

    Payload of the first frame: the profile's digest (4 bytes). Of every frame: the window as ``bf16`` writes it and the
    sinks as ``fp8`` does, all layers' heads in a row; then of keys, then of values: shifts, then scales of all
    groups that are not of type none (high bytes, then low bytes) and each group's numbers ``[axes, tokens]``, packed.
    """

    codec: KVTC
    fingerprint: str
    profile: PlainProfile | None = None
    digest: bytes = b""
    _started: bool = field(default=False, init=False)

    def encode_tokens(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Bytes for ``k`` tokens; see :class:`~kvferry.codecs.base.JointCoder`.

        Raises
        ------
        InputError
            NaN or infinity, or another shape than the profile's.
        """
        profile = self.profile
        if profile is None:
            raise InputError("a decoder does not encode; use KVTC.encoder()")
        check_tokens(keys, values, profile.shape)
        places = self._places(positions, layout)
        parts = [b"" if self._started else self.digest]
        self._started = True
        keys, values = keys.cpu(), values.cpu()
        for codec, mine in ((BF16(), places.window), (FP8(), places.sinks)):
            exact = keys.flatten(0, 1)[:, mine], values.flatten(0, 1)[:, mine]
            parts.append(b"".join(codec.encode_side(0, w, x, positions) for w, x in zip(_BOTH, exact, strict=True)))
        middle = places.middle
        rows = to_rows(profile.rotary, keys[:, :, middle], values[:, :, middle], places.rotary)
        for axes, side in zip((profile.keys, profile.values), sides(rows, profile.shape[2]), strict=True):
            parts.append(self._encode(axes, (side - axes.mean) @ axes.vectors))
        return b"".join(parts)

    def decode_tokens(
        self, payload: bytes, shape: tuple[int, int, int, int], positions: torch.Tensor, layout: PromptLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, bfloat16 of ``shape`` (``[layers, kv_heads, k, head_dim]``)."""
        if not self._started:
            if len(payload) < DIGEST:
                raise CorruptError("a first frame without its profile's digest")
            self.profile, payload = for_decoding(PlainProfile, self.fingerprint, payload[:DIGEST]), payload[DIGEST:]
            self._started = True
        profile = self.profile
        if profile is None or (shape[0], shape[1], shape[3]) != profile.shape:
            raise CorruptError(f"a cache of {list(shape)} does not fit its profile")
        places = self._places(positions, layout)
        layers, heads, _, dim = shape
        exact: tuple[tuple[Side, torch.Tensor], ...] = ((BF16(), places.window), (FP8(), places.sinks))
        shapes = [(layers * heads, int(mine.sum()), dim) for _, mine in exact]
        both, tokens = (profile.keys, profile.values), int(places.middle.sum())
        sizes = [c.side_size(w, flat, positions) for (c, _), flat in zip(exact, shapes, strict=True) for w in _BOTH]
        sizes += [self._size(axes, tokens) for axes in both]
        check_size(0, payload, sum(sizes))
        parts = [np.frombuffer(payload[a:b], np.uint8) for a, b in pairwise(np.cumsum([0, *sizes]))]
        out = torch.empty(2, *shape, dtype=torch.bfloat16)
        for number, ((codec, mine), flat) in enumerate(zip(exact, shapes, strict=True)):
            for side, what in enumerate(_BOTH):
                numbers = codec.decode_side(what, parts[2 * number + side], flat, positions)
                check_numbers(0, **{what: numbers})
                out[side, :, :, mine] = numbers.view(layers, heads, -1, dim)
        rows = torch.stack(
            [self._decode(axes, part, tokens) for axes, part in zip(both, parts[4:], strict=True)], 1
        ).view(tokens, 2, layers, heads, dim)
        middle = from_rows(profile.rotary, rows.permute(0, 2, 3, 1, 4).flatten(1), profile.shape, places.rotary)
        out[:, :, :, places.middle] = torch.stack(middle)
        return out[0], out[1]

    def _encode(self, axes: Axes, c: torch.Tensor) -> bytes:
        """One side's coefficients, ``[tokens, r]``."""
        bounds, packed = [], []
        for group in self._plan(axes, len(c)):
            low, scale, numbers = quantize(c[:, group.span].T, group.width)
            bounds.append(torch.stack([low, scale]))
            packed.append(numbers.tobytes())
        return to_words(torch.stack(bounds, 1)) + b"".join(packed) if bounds else b""

    def _decode(self, axes: Axes, octets: Bytes, tokens: int) -> torch.Tensor:
        """One side's rows, ``[tokens, p / 2]``."""
        groups = self._plan(axes, tokens)
        low, scale = from_words(octets[: 4 * len(groups)]).view(2, len(groups))
        at, c = 4 * len(groups), torch.zeros(len(axes.octaves), tokens)
        for i, group in enumerate(groups):
            size = group.size(tokens)
            levels = dequantize(octets[at : at + size], group.width, c[group.span].numel())
            c[group.span] = low[i] + scale[i] * levels.view(-1, tokens)
            at += size
        return c.T @ axes.vectors.T + axes.mean

    def _size(self, axes: Axes, tokens: int) -> int:
        return sum(4 + group.size(tokens) for group in self._plan(axes, tokens))

    def _plan(self, axes: Axes, tokens: int) -> tuple[Group, ...]:
        return plan(tuple(axes.octaves.tolist()), tokens, int(16 * len(axes.mean) * tokens / self.codec.ratio))

    def _places(self, positions: torch.Tensor, layout: PromptLayout) -> _Places:
        where = positions.cpu()
        window = where >= len(layout) - self.codec.window
        sinks = (where < SINKS) & ~window
        middle = ~(window | sinks)
        turns = torch.from_numpy(layout.positions[:, where[middle].numpy()].astype(np.int64))
        return _Places(window, sinks, middle, turns)


class _Places(NamedTuple):
    """Which tokens are coded how, bool ``[k]`` each, and rotary positions ``[axes, coded]`` of those in the middle."""

    window: torch.Tensor
    sinks: torch.Tensor
    middle: torch.Tensor
    rotary: torch.Tensor


def sides(rows: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[k, p / 2]`` of rows ``[k, p]``."""
    keys, values = rows.view(len(rows), rows.shape[1] // (2 * dim), 2, dim).unbind(2)
    return keys.flatten(1), values.flatten(1)
