"""What every codec checks of what it is given: finite numbers, right shapes, right sizes."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from kvferry.codecs.base import LIMIT, Shape
from kvferry.errors import CorruptError, InputError, KVFerryWarning
from kvferry.lazy import torch

INFINITY = 0x7F80
"""Bits of bfloat16's; above it, without the sign, is NaN."""


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
        for layer, some in enumerate(tensor):
            check_finite(layer, what, some)
    if (keys.shape[0], keys.shape[1], keys.shape[3]) != shape or values.shape != keys.shape:
        raise InputError(f"a cache of {list(keys.shape)} does not fit a profile for {list(shape)}")


def check_size(layer: int, payload: bytes, expected: int) -> None:
    """Refuse a payload that is not exactly as long as its shapes say."""
    if len(payload) != expected:
        raise CorruptError(f"layer {layer}: a payload of {len(payload)} bytes, where its shapes need {expected}")


def check_numbers(layer: int, **tensors: torch.Tensor) -> None:
    """Refuse decoded numbers (any float dtype) that are none: a scale or a number of the payload was NaN or infinite.

    Raises
    ------
    CorruptError
        By the name of the layer and of the tensor.
    """
    for what, tensor in tensors.items():
        if not _finite(tensor):
            raise CorruptError(
                f"the {what} of layer {layer} decode to NaN or infinity, which no encoder writes; have them sent again"
            )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are; their sum, which takes no memory and little time, is looked at first."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_words(words: npt.NDArray[np.uint16]) -> None:
    """Refuse bfloat16 words of a payload (scales, bounds, exact numbers) that are NaN or infinite.

    Raises
    ------
    CorruptError
    """
    numbers = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)
    if not _finite(numbers):
        raise CorruptError("a scale or a number of the payload is NaN or infinite, which no encoder writes")


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
