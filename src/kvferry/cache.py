"""The nouns: what a prompt looks like and what a cache is, as plain data (numpy and torch only)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from kvferry.errors import InputError


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
        Index into the prompt of every kept token, ascending along the last axis.
        Heads may keep different tokens, but equally many.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor

    def __post_init__(self) -> None:
        heads, kept = self.keys.shape[:2]
        if self.values.shape[:2] != (heads, kept) or self.positions.shape != (heads, kept):
            raise InputError(
                f"keys {list(self.keys.shape)}, values {list(self.values.shape)} and positions "
                f"{list(self.positions.shape)} must agree on [kv_heads, kept]"
            )

    @property
    def kept(self) -> int:
        """How many tokens each head of this layer keeps."""
        return self.keys.shape[1]

    @property
    def shared_positions(self) -> bool:
        """Whether every head keeps the same tokens."""
        return bool((self.positions == self.positions[:1]).all())

    def take(self, index: torch.Tensor) -> LayerCache:
        """Keep the entries ``index`` (int64 ``[kv_heads, k]``, into the stored tokens)."""
        wide = index.unsqueeze(-1)
        return LayerCache(
            self.keys.gather(1, wide.expand(-1, -1, self.keys.shape[-1])).contiguous(),
            self.values.gather(1, wide.expand(-1, -1, self.values.shape[-1])).contiguous(),
            self.positions.gather(1, index).contiguous(),
        )


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
    """

    layers: tuple[LayerCache, ...]
    layout: PromptLayout
    length: int
    fingerprint: str
    recipe: str = "full|bf16"
    model_name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("a cache needs at least one layer")
        if not 0 < self.length <= len(self.layout):
            raise InputError(f"length {self.length} does not fit a prompt of {len(self.layout)} tokens")

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    @property
    def pending(self) -> npt.NDArray[np.int32]:
        """Prompt tokens that are not in the cache yet and must be fed when it is resumed."""
        return self.layout.token_ids[self.length :]

    @property
    def nbytes(self) -> int:
        """Bytes the stored keys and values take in memory, as they are."""
        return sum(x.keys.nbytes + x.values.nbytes for x in self.layers)

    @property
    def full_bf16_bytes(self) -> int:
        """Size of the same cache with every prompt token in BF16: the denominator of every ratio we print."""
        per_token = sum(x.keys.shape[0] * (x.keys.shape[2] + x.values.shape[2]) * 2 for x in self.layers)
        return per_token * len(self.layout)

    @property
    def kept(self) -> tuple[int, ...]:
        """Tokens kept per layer."""
        return tuple(x.kept for x in self.layers)
