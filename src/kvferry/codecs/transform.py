"""Transform coding: a token's keys and values of all layers, in a calibrated basis, range-coded."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvferry.cache import PromptLayout
from kvferry.codecs import densities
from kvferry.codecs.activity import Activity
from kvferry.codecs.checks import check_tokens, warn_beyond
from kvferry.codecs.entropy import Decoder, Encoder
from kvferry.codecs.frequencies import TOTAL
from kvferry.codecs.neighbours import Neighbours
from kvferry.codecs.profile import DIGEST, OCTAVE, Basis, Profile, from_rows, to_rows, words
from kvferry.codecs.profile_store import for_decoding, for_encoding
from kvferry.errors import CorruptError, InputError
from kvferry.lazy import torch

Numbers = npt.NDArray[np.int64]
Symbols = npt.NDArray[np.int32]
_HEAD = struct.Struct(f"<{DIGEST}sh")
_DEAD = -14
"""A coefficient whose standard deviation is below ``2 ** (-14 / 8) = 0.3`` steps is not coded."""
_FINEST = 54
"""The largest standard deviation is at most ``2 ** (54 / 8) = 108`` steps, where the range coder's models end."""
_FARTHEST = 800
"""No step lies outside ``2 ** -100`` to ``2 ** 100``."""
_ZERO = 0.6
"""Magnitudes below so many steps become zero. Rounding's 0.5 would cost more bits than its smaller error is worth."""


@dataclass(frozen=True)
class Transform:
    """One token's keys and values of all layers and heads as one vector: its mean taken off, turned into a calibrated
    basis, quantized with one step and range-coded by calibrated models.

    After KVTC (arXiv 2511.01815), whose gain is coding all layers together, with these differences:

    * Visual and text tokens have a basis each. A text token's mean is that of its id, for the decoder knows the
      text.
    * Keys and values share one basis, for they predict each other. Keys are un-rotated first, M-RoPE's three axes too.
    * Errors are weighed by how much they move the answer's logits (see :mod:`kvferry.models.sensitivity`) instead of
      equally: the step is uniform where that is uniform.
    * No group has a width of its own. One step for all coefficients is what reverse water-filling asks for, and the
      range coder spends on each what it is worth; the models are indexed by integers in the profile, so that both ends
      agree on every bit.
    * Visual tokens are predicted from those to their left and above, where the profile says how
      (:class:`~kvferry.codecs.neighbours.Neighbours`); what is coded is the difference.
    * A token whose coefficients so far are larger than calibrated gets wider models for the next ones
      (:class:`~kvferry.codecs.activity.Activity`), and a quiet one narrower ones.
    * No sinks or windows in 16 bit: before the first picture the means of token ids are exact, as long as the
      template is the same.

    All layers and heads must keep the same tokens (``full``, ``q2c``, ``random`` or any scorer with
    ``budget=shared``). Decodes in float32 arithmetic to bfloat16.

    Parameters
    ----------
    ratio : float
        16 bits over the bits that a visual token's numbers take on average, by the statistics of the profile; it sets
        the step. Real caches, of busy tokens and quiet ones, take fewer. The finest step is 1/108 of the largest
        standard deviation, however small the ratio: with few axes for wide tokens no small ratio can be reached
        (:meth:`reachable`, which ``kvferry calibrate`` prints), and one that is asked for is warned about.
    profile : str
        File by ``kvferry calibrate``; by default the one that is here for the model. Whoever decodes finds it by the
        model's fingerprint and the file's digest, which are in the stream.
    """

    name: ClassVar[str] = "transform"
    argument: ClassVar[str] = "ratio"

    ratio: float = 64.0
    profile: str = ""

    def __post_init__(self) -> None:
        if not 1.0 <= self.ratio <= 1e5:
            raise InputError(f"transform:{self.ratio:g}: a ratio lies between 1 and 100000")

    def encoder(self, fingerprint: str) -> TransformCoder:
        """Encodes streams of the model with this fingerprint."""
        profile, digest = for_encoding(Profile, self.profile, fingerprint)
        warn_beyond(self.name, self.ratio, self.reachable(profile))
        step = _step(_leading(profile), self.ratio)
        return TransformCoder(fingerprint, profile, _HEAD.pack(digest, step))

    def decoder(self, fingerprint: str) -> TransformCoder:
        """Decodes streams of the model with this fingerprint."""
        return TransformCoder(fingerprint)

    @staticmethod
    def reachable(profile: Profile) -> tuple[float, float]:
        """The ratios of the finest and of the coarsest step at which something is coded.

        All ratios below the first give the same stream, the most exact that the profile's axes allow; above the second
        only means are left.
        """
        basis = _leading(profile)
        most = int(basis.octaves.max())
        finest, coarsest = (_bits_at(basis, step) for step in (most - _FINEST, most - _DEAD))
        return 16 * len(basis.mean) / finest, 16 * len(basis.mean) / coarsest


@dataclass
class TransformCoder:
    """Encodes or decodes one stream.

    Payload of the first frame: the profile's digest (4 bytes) and the step (int16, in eighths of an octave). Of every
    frame: range-coded symbols, those of visual tokens first, some coefficients at a time. Visual tokens of earlier
    frames help to predict those of later ones.
    """

    fingerprint: str
    profile: Profile | None = None
    head: bytes = b""
    _started: bool = field(default=False, init=False)
    _neighbours: Neighbours | None = field(default=None, init=False)

    def encode_tokens(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Bytes for ``k`` tokens.

        Parameters
        ----------
        keys, values : ``[layers, kv_heads, k, head_dim]``
            Keys as they are in the cache, rotated.
        positions : int64 ``[k]``
            Index into the prompt.

        Raises
        ------
        InputError
            NaN or infinity, another shape than the profile's, or tokens of a modality that it was calibrated without.
        """
        profile = self.profile
        if profile is None:
            raise InputError("a decoder does not encode; use Transform.encoder()")
        check_tokens(keys, values, profile.shape)
        where, step = _Places(profile, positions, layout), self._step
        x = to_rows(profile.rotary, keys, values, where.rotary)
        off = x - where.means.to(x.device)
        encoder = Encoder()
        for part, what in zip(self._parts(profile, where), ("visual", "text"), strict=True):
            if not len(part.basis.octaves) and bool(part.mine.any()):
                raise InputError(
                    f"this profile was calibrated without {what} tokens, and the cache has some; calibrate on "
                    f"{'questions with pictures' if what == 'visual' else 'a selection that keeps text'}"
                )
            c = part.basis.forward(off[part.mine.to(x.device)]).cpu() / 2 ** (step / OCTAVE)
            _write(encoder, part.symbols(c[:, part.alive].numpy()), part.octaves)
        coded = encoder.finish()
        started, self._started = self._started, True
        return coded if started else self.head + coded

    def decode_tokens(
        self, payload: bytes, shape: tuple[int, int, int, int], positions: torch.Tensor, layout: PromptLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, bfloat16 of ``shape`` (``[layers, kv_heads, k, head_dim]``)."""
        if not self._started:
            if len(payload) < _HEAD.size:
                raise CorruptError("a first frame without its head")
            self.head, payload = payload[: _HEAD.size], payload[_HEAD.size :]
            self.profile = for_decoding(Profile, self.fingerprint, self.head[:DIGEST])
            if abs(self._step) > _FARTHEST:
                raise CorruptError("a step that no encoder takes")
            self._started = True
        profile = self.profile
        if profile is None or (shape[0], shape[1], shape[3]) != profile.shape:
            raise CorruptError(f"a cache of {list(shape)} does not fit its profile")
        where = _Places(profile, positions, layout)
        x, decoder = where.means, Decoder(payload)
        for part in self._parts(profile, where):
            tokens = int(part.mine.sum())
            c = torch.zeros(tokens, len(part.alive))
            c[:, part.alive] = torch.from_numpy(part.values(_read(decoder, tokens, part.octaves))).float()
            x[part.mine] += part.basis.inverse(c * 2 ** (self._step / OCTAVE))
        decoder.finish()
        return from_rows(profile.rotary, x, profile.shape, where.rotary)

    @property
    def _step(self) -> int:
        step: int = _HEAD.unpack(self.head)[1]
        return step

    def _parts(self, profile: Profile, where: _Places) -> tuple[_Part, _Part]:
        """Visual tokens, then text."""
        visual = _Part(profile.visual, where.visual, self._step)
        if profile.prediction is not None:
            if self._neighbours is None:
                self._neighbours = Neighbours(profile.prediction, where.layout, self._step, visual.alive)
            visual = _Predicted(visual, self._neighbours, where.pictured)
        return visual, _Part(profile.text, ~where.visual, self._step)


class _Places:
    """What profile and prompt say about the tokens at ``positions`` before a bit of theirs is read."""

    def __init__(self, profile: Profile, positions: torch.Tensor, layout: PromptLayout) -> None:
        index = positions.cpu().numpy()
        self.layout = layout
        self.visual = torch.from_numpy(layout.visual[index])
        self.means = profile.means(words(layout)[index], self.visual)
        self.rotary = torch.from_numpy(layout.positions[:, index].astype(np.int64))
        self.pictured = (layout.visual.cumsum() - 1)[index[layout.visual[index]]]
        """Where the visual ones among them stand among all visual tokens."""


class _Part:
    """Tokens of one frame that share a basis.

    Attributes
    ----------
    mine : bool ``[tokens of the frame]``
    alive : bool ``[r]``
        The ``a`` coefficients that are coded.
    octaves : int64 ``[a, 1]``, or ``[a, k]`` where tokens differ
        Their standard deviations in steps, in eighths of an octave.
    """

    def __init__(self, basis: Basis, mine: torch.Tensor, step: int) -> None:
        self.basis, self.mine = basis, mine
        self.alive = basis.octaves - step >= _DEAD
        self.octaves = basis.octaves[self.alive, None].numpy().astype(np.int64) - step

    def symbols(self, c: npt.NDArray[np.float32]) -> Symbols:
        """Of coefficients in steps (``[k, a]``), ``[a, k]``."""
        return np.ascontiguousarray(_quantized(c).T)

    def values(self, symbols: Symbols) -> npt.NDArray[np.floating[Any]]:
        """Coefficients in steps, ``[k, a]``."""
        return symbols.T.astype(np.float32)


class _Predicted(_Part):
    """Visual tokens whose differences from what their neighbours say are coded."""

    def __init__(self, part: _Part, neighbours: Neighbours, tokens: Numbers) -> None:
        self.basis, self.mine, self.alive = part.basis, part.mine, part.alive
        self._neighbours, self._tokens = neighbours, tokens
        self._patterns = neighbours.arrive(tokens)
        self.octaves = np.concatenate([part.octaves, neighbours.octaves], 1)[:, self._patterns]

    def symbols(self, c: npt.NDArray[np.float32]) -> Symbols:
        symbols = np.zeros(c.shape, np.int32)

        def differences(some: Numbers, guess: npt.NDArray[np.float64]) -> Symbols:
            symbols[some] = found = _quantized(c[some] - guess)
            return found

        self._neighbours.walk(self._tokens, self._patterns, differences)
        return np.ascontiguousarray(symbols.T)

    def values(self, symbols: Symbols) -> npt.NDArray[np.floating[Any]]:
        return self._neighbours.walk(self._tokens, self._patterns, lambda some, _: symbols.T[some])


def _quantized(c: npt.NDArray[np.floating[Any]]) -> Symbols:
    """Whole steps."""
    magnitude = np.minimum(np.floor(np.abs(c) + (1 - _ZERO)), 2**30)
    symbols: Symbols = np.copysign(magnitude, c).astype(np.int32)
    return symbols


def _write(encoder: Encoder, symbols: Symbols, octaves: Numbers) -> None:
    """``symbols [a, k]``, some coefficients at a time, each token's by the models that suit it."""
    activity, rows = fastest_activity()(symbols.shape[1]), densities.model_of(octaves)
    for some in _batches(symbols):
        order, counts, which = activity.groups(octaves[some])
        encoder.groups(symbols[some].reshape(-1)[order], counts, which, densities.laplace())
        activity.update(rows[some], symbols[some])


def _read(decoder: Decoder, tokens: int, octaves: Numbers) -> Symbols:
    """What :func:`_write` got."""
    activity, rows = fastest_activity()(tokens), densities.model_of(octaves)
    symbols = np.empty((len(octaves), tokens), np.int32)
    for some in _batches(symbols):
        order, counts, which = activity.groups(octaves[some])
        symbols[some].reshape(-1)[order] = decoder.groups(counts, which, densities.laplace())
        activity.update(rows[some], symbols[some])
    return symbols


def _batches(symbols: Symbols) -> Iterator[slice]:
    """A quarter as many coefficients as came before, at least one: fewer calls, next to nothing lost."""
    start, count = 0, len(symbols) if symbols.size else 0
    while start < count:
        stop = start + max(1, start // 4)
        yield slice(start, stop)
        start = stop


@cache
def _bits() -> npt.NDArray[np.float64]:
    """Entropy of a symbol in bits, for each of the range coder's models."""
    share = densities.laplace().frequencies / TOTAL
    bits: npt.NDArray[np.float64] = -(share * np.log2(share)).sum(1)
    return bits


@lru_cache(maxsize=64)
def _step(basis: Basis, ratio: float) -> int:
    """The smallest step at which a token takes ``16 / ratio`` bits a number, by the entropy of its coefficients."""
    most = int(basis.octaves.max())
    budget = 16 * len(basis.mean) / ratio
    steps = range(most - _FINEST, most - _DEAD + 1)
    return next((step for step in steps if _bits_at(basis, step) <= budget), most - _DEAD + 1)


def _bits_at(basis: Basis, step: int) -> float:
    """What a token of calibrated statistics takes."""
    octaves = basis.octaves.numpy().astype(np.int64) - step
    return float(_bits()[densities.model_of(octaves[octaves >= _DEAD])].sum())


def _leading(profile: Profile) -> Basis:
    """The basis that the step follows from: that of visual tokens, or of text where there were none."""
    return profile.visual if len(profile.visual.octaves) else profile.text


@cache
def fastest_activity() -> type[Activity]:
    """Compiled, where the package numba is installed."""
    with suppress(ImportError):
        from kvferry.codecs import activity_kernels

        return activity_kernels.Activity
    return Activity
