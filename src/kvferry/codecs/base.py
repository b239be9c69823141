"""Kept tokens <-> bytes, one layer at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from kvferry.cache import LayerCache, PromptLayout
from kvferry.errors import CorruptError, InputError, KVFerryWarning
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


def not_finite(layer: int, what: str) -> InputError:
    """What is raised over NaN, infinity and what bfloat16 cannot hold, by the name of the layer."""
    return InputError(
        f"the {what} of layer {layer} hold NaN, infinity or numbers beyond {LIMIT:g}; look for what broke the "
        "prefill (a float16 overflow is the usual cause: load the model in bfloat16)"
    )


def check_finite(layer: int, what: str, tensor: torch.Tensor) -> None:
    """Raise :func:`not_finite` where that is called for."""
    if tensor.numel() and not bool(tensor.float().abs().amax() <= LIMIT):
        raise not_finite(layer, what)


def check_tokens(keys: torch.Tensor, values: torch.Tensor, shape: Shape) -> None:
    """Refuse what a :class:`JointCoder` with a profile for ``shape`` (layers, KV heads, channels) cannot encode.

    Raises
    ------
    InputError
        NaN, infinity or what bfloat16 cannot hold, or another shape.
    """
    for what, tensor in (("keys", keys), ("values", values)):
        for layer, peak in enumerate(tensor.abs().float().flatten(1).amax(1) if tensor.numel() else ()):
            if not bool(peak <= LIMIT):
                raise not_finite(layer, what)
    if (keys.shape[0], keys.shape[1], keys.shape[3]) != shape or values.shape != keys.shape:
        raise InputError(f"a cache of {list(keys.shape)} does not fit a profile for {list(shape)}")


def warn_beyond(name: str, ratio: float, reachable: tuple[float, float]) -> None:
    """Warn where ``name:ratio`` lies outside the ratios that a profile can reach."""
    least, most = reachable
    if least <= ratio <= most:
        return
    why = (
        f"the stream is the same for all ratios below {least:.4g}; for more exact ones calibrate with a larger --rank"
        if ratio < least
        else "only means are left; choose a smaller ratio"
    )
    warnings.warn(
        f"{name}:{ratio:g} is beyond what this profile reaches ({least:.4g} to {most:.4g}): {why}",
        KVFerryWarning,
        stacklevel=2,
    )


def check_size(layer: int, payload: bytes, expected: int) -> None:
    """Refuse a payload that is not exactly as long as its shapes say."""
    if len(payload) != expected:
        raise CorruptError(f"layer {layer}: a payload of {len(payload)} bytes, where its shapes need {expected}")


def for_stage(codec: AnyCodec, lossless: bool) -> AnyCodec:
    """What encodes and decodes where a lossless stage follows, or none does: ``codec`` itself where it is all one."""
    arranged: AnyCodec = _of(codec, "for_stage", lossless)
    return arranged


def encoder_of(codec: AnyCodec, fingerprint: str, layers: int) -> Codec | JointCoder:
    """What encodes one stream of so many layers: ``codec`` itself where it remembers nothing."""
    coder: Codec | JointCoder = _of(_of(codec, "for_layers", layers), "encoder", fingerprint)
    return coder


def decoder_of(codec: AnyCodec, fingerprint: str) -> Codec | JointCoder:
    """What decodes one stream: ``codec`` itself where it remembers nothing."""
    coder: Codec | JointCoder = _of(codec, "decoder", fingerprint)
    return coder


def _of(codec: Any, which: str, about: str | int) -> Any:
    make = getattr(codec, which, None)
    return codec if make is None else make(about)


def stack(layers: Sequence[LayerCache]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values ``[layers, kv_heads, k, head_dim]`` and positions ``[k]`` of layers that keep the same tokens.

    Raises
    ------
    InputError
        They do not, or their shapes differ.
    """
    first = layers[0].positions[:1]
    shapes = {(x.keys.shape, x.values.shape) for x in layers}
    if len(shapes) > 1 or not all(torch.equal(x.positions, first.expand_as(x.positions)) for x in layers):
        raise InputError(
            "this codec codes a token's vectors of all layers together, but layers or heads keep different tokens; "
            "add budget=shared to the selection (leaveout@0.1,budget=shared), or choose a codec such as int4"
        )
    return torch.stack([x.keys for x in layers]), torch.stack([x.values for x in layers]), first[0]
