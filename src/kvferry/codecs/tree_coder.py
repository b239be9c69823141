"""Frames of ``transform`` with a :class:`~kvferry.codecs.tree.TreeProfile`: some tokens at a time, class by class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvferry.cache import PromptLayout
from kvferry.codecs.entropy import Decoder, Encoder
from kvferry.codecs.profile import OCTAVE, from_rows, to_rows, words
from kvferry.codecs.symbols import DEAD, Numbers, quantized, read, write
from kvferry.codecs.tree import FIRST, MOST_STARTS, VISUAL, Tree, TreeProfile, classes, starts
from kvferry.errors import CorruptError, InputError
from kvferry.lazy import torch

ROOM = 1 << 20
"""Numbers of tokens that are coded together: what they take on their way is small beside the cache."""
LEAST = 32


class Part(NamedTuple):
    """Some tokens of one class.

    Attributes
    ----------
    mine : int64 ``[k]``
        Their places in the frame.
    coded : int
        How many coefficients: those that calibration says reach a step at times; of the first tokens all, for these are
        like no others, and where no template is known nothing says how large they are.
    octaves : int64 ``[coded, 1]``
        Their standard deviations in steps.
    size : float
        The step.
    expected : float32 ``[k, m]``
        Their leading coefficients, as far as the profile knows them.
    start : int64 ``[k]``
        The row of ``start_means`` that is all of a token, or -1.
    rotary : int64 ``[axes, k]``
        Rotary positions.
    """

    tree: Tree
    mine: Numbers
    coded: int
    octaves: Numbers
    size: float
    expected: torch.Tensor
    start: Numbers
    rotary: torch.Tensor

    def means(self, profile: TreeProfile) -> torch.Tensor:
        """What is taken off keys and values, ``[k, p]``."""
        known = torch.from_numpy(self.start >= 0)
        means = self.tree.mean.expand(len(known), -1).clone()
        means[known] = profile.start_means[torch.from_numpy(self.start)[known]]
        return means


def encode(
    profile: TreeProfile,
    step: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    layout: PromptLayout,
) -> bytes:
    """Bytes of keys and values ``[layers, kv_heads, k, head_dim]``.

    Raises
    ------
    InputError
        Tokens of a modality that the profile was calibrated without.
    """
    encoder = Encoder()
    for part in _parts(profile, step, positions, layout):
        mine = torch.from_numpy(part.mine).to(keys.device)
        x = to_rows(profile.rotary, keys[:, :, mine], values[:, :, mine], part.rotary).cpu()
        c = part.tree.forward(x.sub_(part.means(profile)), part.coded)
        shared = min(part.coded, part.expected.shape[1])
        c[:, :shared] -= part.expected[:, :shared]
        symbols = quantized(c.numpy() / np.float32(part.size))
        coded = part.start < 0
        if not coded.all():
            unlike = np.asarray(symbols[~coded].any(1))
            encoder.numbers(unlike.astype(np.int64), 2)
            coded[~coded] = unlike
        write(encoder, np.ascontiguousarray(symbols[coded].T), part.octaves)
    return encoder.finish()


def decode(
    profile: TreeProfile, step: int, payload: bytes, positions: torch.Tensor, layout: PromptLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`encode` got, in bfloat16."""
    layers, heads, dim = profile.shape
    decoder, out = Decoder(payload), torch.empty(2, layers, heads, len(positions), dim, dtype=torch.bfloat16)
    try:
        for part in _parts(profile, step, positions, layout):
            coded = part.start < 0
            if not coded.all():
                coded[~coded] = decoder.numbers(int((~coded).sum()), 2) > 0
            c = torch.zeros(len(coded), max(part.coded, part.expected.shape[1]))
            symbols = read(decoder, int(coded.sum()), part.octaves)
            c[torch.from_numpy(coded), : part.coded] = torch.from_numpy(symbols.T.astype(np.float32)) * part.size
            c[:, : part.expected.shape[1]] += part.expected
            x = part.tree.inverse(c).add_(part.means(profile))
            out[:, :, :, torch.from_numpy(part.mine)] = torch.stack(
                from_rows(profile.rotary, x, profile.shape, part.rotary)
            )
    except InputError as error:
        raise CorruptError(str(error)) from None
    decoder.finish()
    return out[0], out[1]


def _parts(profile: TreeProfile, step: int, positions: torch.Tensor, layout: PromptLayout) -> Iterator[Part]:
    """The tokens at ``positions``, class by class, so many at a time as there is room for."""
    index = positions.cpu().numpy()
    kinds, words_ = classes(layout)[index], words(layout).numpy()[index]
    start = _rows_of(profile.starts, starts(layout, MOST_STARTS))
    start = np.concatenate([start, np.full(len(layout) - len(start), -1)])[index]
    known = _rows_of(profile.words, words_)
    room = max(LEAST, ROOM // profile.start_means.shape[1])
    for kind, finer in enumerate(profile.steps.tolist()):
        every = np.flatnonzero(kinds == kind)
        for at in range(0, len(every), room):
            mine = every[at : at + room]
            tree = profile.visual if kind == VISUAL else profile.text
            if tree is None:
                what, calibrate = ("visual", "pictures") if kind == VISUAL else ("text", "text")
                raise InputError(
                    f"this profile was calibrated without {what} tokens, and the cache has some; calibrate on "
                    f"questions and a selection that keep {calibrate}"
                )
            octaves = tree.ranked - (step - finer)
            count = len(octaves) if kind == FIRST else int((octaves >= DEAD).sum())
            expected = torch.zeros(len(mine), profile.word_means.shape[1])
            some = torch.from_numpy((known[mine] >= 0) & (start[mine] < 0) & (kind != VISUAL))
            expected[some] = profile.word_means[torch.from_numpy(known[mine])[some]]
            yield Part(
                tree=tree,
                mine=mine,
                coded=count,
                octaves=octaves[:count, None],
                size=float(2 ** ((step - finer) / OCTAVE)),
                expected=expected,
                start=start[mine],
                rotary=torch.from_numpy(layout.positions[:, index[mine]].astype(np.int64)),
            )


def _rows_of(known: torch.Tensor, wanted: Numbers) -> Numbers:
    """Where each of ``wanted`` stands in ``known`` (ascending), or -1."""
    if not len(known):
        return np.full(len(wanted), -1)
    numbers = known.numpy()
    at = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    rows: Numbers = np.where(numbers[at] == wanted, at, -1)
    return rows
