"""Differences from an anchor token, range-coded, in coarser steps in deeper layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvferry.cache import PromptLayout
from kvferry.codecs.base import LIMIT, Shape
from kvferry.codecs.checks import check_finite
from kvferry.codecs.entropy import SCALES, Decoder, Encoder, Symbols, fit, laplace
from kvferry.codecs.levels import by_channel, quantize, restore
from kvferry.codecs.packing import Bytes, Words
from kvferry.errors import CorruptError, InputError
from kvferry.lazy import torch

Numbers = npt.NDArray[np.float64]
_REACH = 15
_ANCHOR_BITS = 8


@dataclass(frozen=True)
class Delta:
    """Groups of ``group`` tokens: the first of each (the anchor) in 8 bits, the others as differences from it.

    CacheGen's encoder (Y. Liu et al., "CacheGen: KV Cache Compression and Streaming for Fast Large Language Model
    Serving", SIGCOMM 2024, arXiv 2310.07240, section 5.2), as a baseline. The difference is rounded to multiples of
    a step: ``shallow``, ``middle`` and ``deep`` in the three thirds of the layers, in units of the standard deviation
    that the layer's keys, or values, have about the means of their channels. ``group=0`` takes no differences: the
    numbers themselves in the same steps, by the same coder, so that the two compare at equal error.

    Where this departs from the paper:

    * It gives step sizes without a unit; the unit here is said above.
    * It profiles a distribution per layer and channel for each model beforehand; here each (layer, channel) has a model
      that adapts from token to token, which needs no file. On caches of 200 tokens a Laplace model per channel, sent
      along, takes 10 % more for the differences (16 % for ``group=0``); anchors, few a channel, have such models.
    * Differences are taken from the anchor as the decoder knows it, so that its error does not add.

    On the testbed's cloud (full caches, validation split) the differences have a higher entropy than the numbers, 2.27
    against 1.80 bits at the steps below: neighbours are not alike enough to make up for the anchor's share of noise.

    Bytes: one range-coded stream; of keys, then values: the step (bfloat16), the anchors' scales and numbers (or each
    channel's median in steps), and the rounded differences, those of magnitude 15 and more by their excess.

    Parameters
    ----------
    group : int
        Tokens in a group, counted among those kept.
    shallow, middle, deep : float
        The steps of the paper's default level.
    layers : int
        Of which the thirds are taken; 0 for as many as the cache has.
    """

    name: ClassVar[str] = "delta"
    argument: ClassVar[str] = "group"

    group: int = 10
    shallow: float = 0.5
    middle: float = 1.0
    deep: float = 1.5
    layers: int = 0

    def __post_init__(self) -> None:
        if self.group < 0 or self.group == 1 or self.layers < 0:
            raise InputError("delta needs groups of 2 tokens or more (0: no differences) and no negative layers")
        if not all(2.0**-6 <= step <= 64 for step in (self.shallow, self.middle, self.deep)):
            raise InputError("delta's steps are numbers of standard deviations from 1/64 to 64, for instance deep=1.5")

    def for_layers(self, layers: int) -> Delta:
        """What encodes a cache of so many layers."""
        return self if self.layers else replace(self, layers=layers)

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes:
        """Raises :class:`~kvferry.errors.InputError` on NaN, infinity, or what bfloat16 cannot hold."""
        third = 3 * layer // max(self.layers, layer + 1)
        step = (self.shallow, self.middle, self.deep)[third]
        encoder = Encoder()
        for what, tensor in (("keys", keys), ("values", values)):
            check_finite(layer, what, tensor)
            if not tensor.numel():
                continue
            channels = tensor.double().cpu().numpy().transpose(0, 2, 1).reshape(-1, tensor.shape[1])
            word, size = _step(channels, step)
            encoder.numbers(word, 1 << 16)
            if self.group:
                scales, numbers = quantize(layer, what, tensor[:, :: self.group], _ANCHOR_BITS)
                encoder.words(scales)
                encoder.words(by_channel(numbers).reshape(len(channels), -1))
                channels = channels - self._spread(scales, numbers, tensor.shape)
                symbols = np.rint(channels[:, self._others(tensor.shape[1])] / size).astype(np.int64)
            else:
                symbols = np.rint(channels / size).astype(np.int64)
                middle = np.median(symbols, 1).astype(np.int32)
                which = fit(middle, np.array([len(middle)]), laplace())
                encoder.numbers(which, SCALES)
                encoder.groups(middle, np.array([len(middle)]), which, laplace())
                symbols -= middle[:, None]
            encoder.adaptive(np.clip(symbols, -_REACH, _REACH) + _REACH, 2 * _REACH + 1)
            magnitude = np.abs(symbols)
            encoder.excess(magnitude[magnitude >= _REACH] - _REACH)
        return encoder.finish()

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
        try:
            decoder = Decoder(payload)
            keys, values = (self._read(decoder, shape) for shape in (key_shape, value_shape))
            decoder.finish()
        except CorruptError as error:
            raise CorruptError(f"layer {layer}: {error}") from None
        return keys, values

    def _read(self, decoder: Decoder, shape: Shape) -> torch.Tensor:
        heads, kept, dim = shape
        rows = heads * dim
        if not rows * kept:
            return torch.empty(shape, dtype=torch.bfloat16)
        size = float(_floats(decoder.numbers(1, 1 << 16))[0])
        if not 0 < size <= LIMIT:
            raise CorruptError("a step of delta is not a positive number")
        if self.group:
            scales = decoder.words(heads, len(range(0, kept, self.group)))
            numbers = by_channel(decoder.words(rows, scales.shape[1]).astype(np.uint8).reshape(heads, dim, -1))
            base = self._spread(scales, numbers, shape)
        else:
            middle = decoder.groups(np.array([rows]), decoder.numbers(1, SCALES), laplace())
            base = np.repeat(middle[:, None] * size, kept, 1)
        others = self._others(kept)
        symbols = decoder.adaptive(rows, int(others.sum()), 2 * _REACH + 1).astype(np.int64) - _REACH
        ends = np.abs(symbols) == _REACH
        symbols[ends] += np.sign(symbols[ends]) * decoder.excess(int(ends.sum()))
        base[:, others] += symbols * size
        tokens = np.clip(base, -LIMIT, LIMIT).reshape(heads, dim, kept).transpose(0, 2, 1)
        return torch.from_numpy(np.ascontiguousarray(tokens)).to(torch.bfloat16)

    def _others(self, kept: int) -> npt.NDArray[np.bool_]:
        """Which tokens are no anchors, ``[kept]``."""
        return np.arange(kept) % self.group != 0 if self.group else np.ones(kept, bool)

    def _spread(self, scales: Words, numbers: Bytes, shape: Sequence[int]) -> Numbers:
        """Every token's anchor as it is decoded, ``[heads * dim, kept]``."""
        heads, kept, dim = shape
        anchors = restore(scales, numbers, _ANCHOR_BITS, (heads, scales.shape[1], dim)).double().numpy()
        spread: Numbers = anchors[:, np.arange(kept) // self.group].transpose(0, 2, 1).reshape(-1, kept)
        return spread


def _step(channels: Numbers, step: float) -> tuple[Words, float]:
    """The step as a word, ``[1]``, and as the number it stands for.

    Never under ``2**-15`` of the largest magnitude: where all tokens are alike, their deviation says nothing.
    """
    unit = max(float(np.sqrt(channels.var(1).mean())), float(np.abs(channels).max()) * 2.0**-15)
    size = torch.tensor([min(max(unit * step, 2.0**-130), LIMIT)], dtype=torch.float64).to(torch.bfloat16)
    return size.view(torch.int16).numpy().view(np.uint16), float(size)


def _floats(words: Symbols) -> torch.Tensor:
    """bfloat16 from words."""
    return torch.from_numpy(words.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
