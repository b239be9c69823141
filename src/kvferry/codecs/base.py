"""Kept tokens <-> bytes, one layer at a time."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from kvferry.cache import PromptLayout
from kvferry.lazy import torch

Shape = tuple[int, int, int]
LIMIT = 3.3e38
"""Just under the largest bfloat16 (3.39e38), so that a scale that is rounded up cannot decode to infinity."""


@runtime_checkable
class Codec(Protocol):
    """A codec is a frozen dataclass with these members.

    ``encode`` gets keys and values of one layer, ``[kv_heads, kept, head_dim]`` of any float dtype, with the
    prompt index of every entry (``[kv_heads, kept]``) and the layout; it returns self-contained bytes.
    ``decode`` gets those bytes and the shapes back and must refuse, by :class:`kvferry.errors.CorruptError`,
    a payload of the wrong size before it allocates anything.

    A codec that remembers something from frame to frame of a stream, or reads a profile, has besides these
    ``encoder(fingerprint)`` and ``decoder(fingerprint)``: they return what encodes or decodes one stream of the model
    with that fingerprint, frame by frame in the order of the stream. An encoder may open a file that the recipe names;
    a decoder must not, for the recipe came with the stream: it looks a profile up among those that are here.

    A codec whose encoder must know how many layers the cache has, has ``for_layers(layers)``: it returns that encoder.

    A codec that arranges its bytes for a lossless stage has ``for_stage(lossless)``: it returns what encodes and
    decodes where such a stage follows, or none does.
    """

    @property
    def name(self) -> str:
        """What a recipe calls it: its key in :data:`kvferry.codecs.CODECS`."""
        ...

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes: ...

    def decode(
        self,
        layer: int,
        payload: bytes,
        key_shape: Shape,
        value_shape: Shape,
        positions: torch.Tensor,
        layout: PromptLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@runtime_checkable
class JointCoder(Protocol):
    """What ``encoder()`` or ``decoder()`` of a codec returns that codes a token's vectors of all layers together.

    Only for caches whose layers and heads all keep the same tokens. Keys and values are
    ``[layers, kv_heads, k, head_dim]``, positions ``[k]``.
    """

    def encode_tokens(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layout: PromptLayout
    ) -> bytes: ...

    def decode_tokens(
        self, payload: bytes, shape: tuple[int, int, int, int], positions: torch.Tensor, layout: PromptLayout
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@runtime_checkable
class JointCodec(Protocol):
    """A codec that codes a token's vectors of all layers together; see :class:`Codec` on what its coders may do."""

    @property
    def name(self) -> str: ...

    def encoder(self, fingerprint: str) -> JointCoder: ...

    def decoder(self, fingerprint: str) -> JointCoder: ...


AnyCodec = Codec | JointCodec
