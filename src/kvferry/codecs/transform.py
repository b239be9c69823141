"""Transform coding: a token's keys and values of all layers, in a calibrated basis, range-coded."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvferry.cache import PromptLayout
from kvferry.codecs.checks import check_tokens, warn_beyond
from kvferry.codecs.entropy import Decoder, Encoder
from kvferry.codecs.neighbours import Neighbours
from kvferry.codecs.profile import DIGEST, OCTAVE, Basis, Profile, TransformProfile, from_rows, to_rows, words
from kvferry.codecs.profile_store import for_decoding, for_encoding
from kvferry.codecs.symbols import DEAD as _DEAD
from kvferry.codecs.symbols import Numbers, Symbols, bits_at, quantized, read, write
from kvferry.codecs.tree import Tree, TreeProfile
from kvferry.codecs.tree_coder import decode, encode
from kvferry.errors import CorruptError, InputError
from kvferry.lazy import torch

_HEAD = struct.Struct(f"<{DIGEST}sh")
_FINEST = 54
"""The largest standard deviation is at most ``2 ** (54 / 8) = 108`` steps, where the range coder's models end."""
_FINEST_OF_TREES = 160
"""A million steps: a few wide coefficients of very many may lie beyond the models, at some bits more each."""
_ROOM = 1 << 21
"""Numbers of tokens that are turned together."""
_LEAST = 64
_FARTHEST = 800
"""No step lies outside ``2 ** -100`` to ``2 ** 100``."""


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
        profile, digest = for_encoding(TransformProfile, self.profile, fingerprint)
        warn_beyond(self.name, self.ratio, self.reachable(profile))
        step = _step(_leading(profile), self.ratio)
        return TransformCoder(fingerprint, profile, _HEAD.pack(digest, step))

    def decoder(self, fingerprint: str) -> TransformCoder:
        """Decodes streams of the model with this fingerprint."""
        return TransformCoder(fingerprint)

    @staticmethod
    def reachable(profile: TransformProfile) -> tuple[float, float]:
        """The ratios of the finest and of the coarsest step at which something is coded.

        All ratios below the first give the same stream, the most exact that the profile's axes allow; above the second
        only means are left.
        """
        basis = _leading(profile)
        octaves = basis.octaves.numpy().astype(np.int64)
        most = int(octaves.max())
        finest, coarsest = (bits_at(octaves, step) for step in (most - _finest(basis), most - _DEAD))
        return 16 * len(basis.mean) / finest, 16 * len(basis.mean) / coarsest


@dataclass
class TransformCoder:
    """Encodes or decodes one stream.

    Payload of the first frame: the profile's digest (4 bytes) and the step (int16, in eighths of an octave). Of every
    frame: range-coded symbols, those of visual tokens first, some coefficients at a time. Visual tokens of earlier
    frames help to predict those of later ones.
    """

    fingerprint: str
    profile: TransformProfile | None = None
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
        started, self._started = self._started, True
        if isinstance(profile, TreeProfile):
            coded = encode(profile, self._step, keys, values, positions, layout)
        else:
            assert isinstance(profile, Profile)
            coded = self._encode(profile, keys, values, positions, layout)
        return coded if started else self.head + coded

    def _encode(
        self,
        profile: Profile,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> bytes:
        where, encoder = _Places(profile, positions, layout), Encoder()
        for part, what in zip(self._parts(profile, where), ("visual", "text"), strict=True):
            if not len(part.basis.octaves) and bool(part.mine.any()):
                raise InputError(
                    f"this profile was calibrated without {what} tokens, and the cache has some; calibrate on "
                    f"{'questions with pictures' if what == 'visual' else 'a selection that keeps text'}"
                )
            found = [torch.zeros(0, len(part.alive))]
            for some in where.chunks(part.mine):
                there = some.to(keys.device)
                x = to_rows(profile.rotary, keys[:, :, there], values[:, :, there], where.rotary[:, some])
                found.append(part.basis.forward(x - where.means(some).to(x.device)).cpu())
            c = torch.cat(found) / 2 ** (self._step / OCTAVE)
            write(encoder, part.symbols(c[:, part.alive].numpy()), part.octaves)
        return encoder.finish()

    def decode_tokens(
        self, payload: bytes, shape: tuple[int, int, int, int], positions: torch.Tensor, layout: PromptLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, bfloat16 of ``shape`` (``[layers, kv_heads, k, head_dim]``)."""
        if not self._started:
            if len(payload) < _HEAD.size:
                raise CorruptError("a first frame without its head")
            self.head, payload = payload[: _HEAD.size], payload[_HEAD.size :]
            self.profile = for_decoding(TransformProfile, self.fingerprint, self.head[:DIGEST])
            if abs(self._step) > _FARTHEST:
                raise CorruptError("a step that no encoder takes")
            self._started = True
        profile = self.profile
        if profile is None or (shape[0], shape[1], shape[3]) != profile.shape:
            raise CorruptError(f"a cache of {list(shape)} does not fit its profile")
        if isinstance(profile, TreeProfile):
            return decode(profile, self._step, payload, positions, layout)
        assert isinstance(profile, Profile)
        where, decoder = _Places(profile, positions, layout), Decoder(payload)
        out = torch.empty(2, *shape, dtype=torch.bfloat16)
        for part in self._parts(profile, where):
            tokens = int(part.mine.sum())
            c = torch.zeros(tokens, len(part.alive))
            c[:, part.alive] = torch.from_numpy(part.values(read(decoder, tokens, part.octaves))).float()
            start = 0
            for some in where.chunks(part.mine):
                mine = c[start : start + len(some)] * 2 ** (self._step / OCTAVE)
                x = where.means(some) + part.basis.inverse(mine)
                out[:, :, :, some] = torch.stack(from_rows(profile.rotary, x, profile.shape, where.rotary[:, some]))
                start += len(some)
        decoder.finish()
        return out[0], out[1]

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
        self._profile, self._words = profile, words(layout)[index]
        self.rotary = torch.from_numpy(layout.positions[:, index].astype(np.int64))
        self.pictured = (layout.visual.cumsum() - 1)[index[layout.visual[index]]]
        """Where the visual ones among them stand among all visual tokens."""

    def chunks(self, mine: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Indices of the tokens ``mine`` (bool ``[k]``), so many at a time as take little beside the cache."""
        layers, heads, dim = self._profile.shape
        room = max(_LEAST, _ROOM // (2 * layers * heads * dim))
        return tuple(torch.split(mine.nonzero()[:, 0], room))

    def means(self, some: torch.Tensor) -> torch.Tensor:
        """What is expected of the tokens at these indices, ``[m, p]``."""
        return self._profile.means(self._words[some], self.visual[some])


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
        return np.ascontiguousarray(quantized(c).T)

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
            symbols[some] = found = quantized(c[some] - guess)
            return found

        self._neighbours.walk(self._tokens, self._patterns, differences)
        return np.ascontiguousarray(symbols.T)

    def values(self, symbols: Symbols) -> npt.NDArray[np.floating[Any]]:
        return self._neighbours.walk(self._tokens, self._patterns, lambda some, _: symbols.T[some])


@lru_cache(maxsize=64)
def _step(basis: Basis | Tree, ratio: float) -> int:
    """The smallest step at which a token takes ``16 / ratio`` bits a number, by the entropy of its coefficients."""
    octaves = basis.octaves.numpy().astype(np.int64)
    most, budget = int(octaves.max()), 16 * len(basis.mean) / ratio
    steps = range(most - _finest(basis), most - _DEAD + 1)
    return next((step for step in steps if bits_at(octaves, step) <= budget), most - _DEAD + 1)


def _finest(basis: Basis | Tree) -> int:
    """How many octaves' eighths the finest step lies below the largest standard deviation."""
    return _FINEST if isinstance(basis, Basis) else _FINEST_OF_TREES


def _leading(profile: TransformProfile) -> Basis | Tree:
    """The basis that the step follows from: that of visual tokens, or of text where there were none."""
    if isinstance(profile, TreeProfile):
        return profile.leading
    assert isinstance(profile, Profile)
    return profile.visual if len(profile.visual.octaves) else profile.text
