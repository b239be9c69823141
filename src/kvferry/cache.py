"""The nouns: what a prompt looks like and what a cache is, as plain data (numpy and torch only)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError, UnsupportedModelError
from kvferry.lazy import torch


class Modality(IntEnum):
    """What a prompt token stands for."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2


class Role(IntEnum):
    """What a prompt token is for. ``SPECIAL`` marks template tokens (turn markers, vision start/end)."""

    CONTEXT = 0
    QUESTION = 1
    SPECIAL = 2


@dataclass(frozen=True)
class PromptLayout:
    """What each of the ``n`` prompt tokens is and where it stands.

    Parameters
    ----------
    token_ids : int32 ``[n]``
        The prompt as the model reads it; visual placeholders are included.
    modality, role : uint8 ``[n]``
        Values of :class:`Modality` and :class:`Role`.
    positions : int32 ``[axes, n]``
        Rotary positions; ``axes`` is 1, or 3 (time, height, width) for M-RoPE.
    rope_delta : int
        Added to a token's index to get the rotary position of what follows the prompt (M-RoPE; else 0).
    grids : tuple of (frames, rows, columns)
        One per picture in prompt order, in merged visual tokens, so that tokens can be drawn over the picture.
        Empty where a family does not place its tokens on a grid.
    """

    token_ids: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    role: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.int32]
    rope_delta: int = 0
    grids: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if len(self.modality) != n or len(self.role) != n or self.positions.shape[-1] != n:
            raise InputError(f"a layout of {n} tokens needs modality, role and positions of the same length")
        if self.positions.ndim != 2 or self.positions.shape[0] not in (1, 3):
            raise InputError(f"positions must be [1 or 3, n], not {list(self.positions.shape)}")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def visual(self) -> npt.NDArray[np.bool_]:
        """True where a token stands for a piece of a picture or video, ``[n]``."""
        return np.not_equal(self.modality, Modality.TEXT)

    @property
    def question(self) -> npt.NDArray[np.bool_]:
        """True on the question's tokens, ``[n]``."""
        return np.equal(self.role, Role.QUESTION)

    @property
    def next_position(self) -> int:
        """Rotary position of the first token after the prompt (the same on every axis)."""
        return len(self) + self.rope_delta

    def head(self, length: int) -> PromptLayout:
        """The layout of the first ``length`` tokens.

        ``rope_delta`` is recomputed so that the token after the cut keeps the position it has here.
        """
        if not 0 < length <= len(self):
            raise InputError(f"cannot take {length} of {len(self)} prompt tokens")
        if length == len(self):
            return self
        follows = int(self.positions[:, length].max())
        return replace(
            self,
            token_ids=self.token_ids[:length],
            modality=self.modality[:length],
            role=self.role[:length],
            positions=self.positions[:, :length],
            rope_delta=follows - length,
        )


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps.

    Parameters
    ----------
    keys, values : ``[kv_heads, kept, head_dim]``
        Keys are post-rotary and keep the rotation of their original position.
    positions : int64 ``[kv_heads, kept]``
        Index into the prompt of every kept token, ascending along the last axis within each head.
    counts : tuple of int, optional
        Only where heads keep differently many tokens: how many each of them keeps. The heads then stand end to end in
        one row: ``keys``, ``values`` ``[1, sum(counts), head_dim]``, ``positions`` ``[1, sum(counts)]``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rows, kept = self.keys.shape[:2]
        if self.values.shape[:2] != (rows, kept) or self.positions.shape != (rows, kept):
            raise InputError(
                f"keys {list(self.keys.shape)}, values {list(self.values.shape)} and positions "
                f"{list(self.positions.shape)} must agree on [kv_heads, kept]"
            )
        if self.counts and (rows != 1 or sum(self.counts) != kept or len(set(self.counts)) == 1):
            raise InputError(f"counts {self.counts} must differ and sum up to one row's length, not {rows} x {kept}")

    @property
    def heads(self) -> int:
        """KV heads of this layer."""
        return len(self.counts) or self.keys.shape[0]

    @property
    def per_head(self) -> tuple[int, ...]:
        """How many tokens each head keeps."""
        return self.counts or (self.keys.shape[1],) * self.keys.shape[0]

    @property
    def kept(self) -> int:
        """How many tokens a head keeps: the mean, rounded down, where heads differ."""
        return sum(self.per_head) // self.heads

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are stored."""
        return self.keys.nbytes + self.values.nbytes

    def take(self, index: torch.Tensor) -> LayerCache:
        """Keep the entries ``index`` (int64 ``[kv_heads, k]``, into the stored tokens) of equally long heads."""
        wide = index.unsqueeze(-1)
        return LayerCache(
            self.keys.gather(1, wide.expand(-1, -1, self.keys.shape[-1])).contiguous(),
            self.values.gather(1, wide.expand(-1, -1, self.values.shape[-1])).contiguous(),
            self.positions.gather(1, index).contiguous(),
        )

    def split(self) -> tuple[LayerCache, ...]:
        """One layer of one head for every head; they share this layer's memory."""
        tensors = (self.keys, self.values, self.positions)
        sizes, axis = (list(self.counts), 1) if self.counts else (1, 0)
        return tuple(LayerCache(*part) for part in zip(*(torch.split(x, sizes, axis) for x in tensors), strict=True))

    @staticmethod
    def join(heads: Sequence[LayerCache]) -> LayerCache:
        """Undo :meth:`split`: one layer of many heads, which may keep differently many tokens."""
        counts = tuple(x.kept for x in heads)
        ragged = len(set(counts)) > 1
        tensors = zip(*((x.keys, x.values, x.positions) for x in heads), strict=True)
        keys, values, positions = (torch.cat(same, int(ragged)) for same in tensors)
        return LayerCache(keys, values, positions, counts if ragged else ())


@dataclass(frozen=True)
class KVCache:
    """One request's cache as plain data: it can be pruned, encoded, carried and resumed without the model.

    Parameters
    ----------
    layers : tuple of :class:`LayerCache`
    layout : :class:`PromptLayout`
        Of the whole prompt.
    length : int
        How many prompt tokens the cache stands for, dropped ones included: ``n - 1`` when a question was asked
        (the last prompt token is fed again to get the first answer token), ``n`` for a scene without a question.
    fingerprint : str
        Digest of the model that made the cache; a cache is only ever resumed on the same one.
    recipe : str
        How it was compressed, in canonical form; ``full|bf16`` straight after prefill.
    scored : tuple of float
        :attr:`kvferry.selection.Selection.scored` of what was kept, on the machine that chose it; it is not sent.
    tied_heads : bool
        Whether all heads of a layer must keep the same tokens, since the model mixes their keys or values (DiffLlama);
        a cache that does otherwise is refused.
    """

    layers: tuple[LayerCache, ...]
    layout: PromptLayout
    length: int
    fingerprint: str
    recipe: str = "full|bf16"
    model_name: str = field(default="", compare=False)
    scored: tuple[float, ...] = field(default=(), compare=False)
    tied_heads: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("a cache needs at least one layer")
        if not 0 < self.length <= len(self.layout):
            raise InputError(f"length {self.length} does not fit a prompt of {len(self.layout)} tokens")
        if self.tied_heads and any(x.counts or bool((x.positions != x.positions[:1]).any()) for x in self):
            raise UnsupportedModelError(
                "this model mixes the heads of a layer, so that all of them must keep the same tokens; choose a recipe "
                "with budget=shared"
            )

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    @property
    def pending(self) -> npt.NDArray[np.int32]:
        """Prompt tokens that are not in the cache yet and must be fed when it is resumed."""
        return self.layout.token_ids[self.length :]

    @property
    def nbytes(self) -> int:
        """Bytes the stored keys and values take in memory, as they are."""
        return sum(x.nbytes for x in self.layers)

    @property
    def full_bf16_bytes(self) -> int:
        """Size of the same cache with all :attr:`length` tokens in BF16: the denominator of every ratio we print.

        That is what would cross if nothing was dropped and nothing quantized. The last token of a prompt with a
        question is fed again on resuming and has no entry, so that it does not count.
        """
        per_token = sum(x.heads * (x.keys.shape[2] + x.values.shape[2]) * 2 for x in self.layers)
        return per_token * self.length

    @property
    def kept(self) -> tuple[int, ...]:
        """Tokens a head keeps, per layer; see :attr:`LayerCache.kept`."""
        return tuple(x.kept for x in self.layers)
