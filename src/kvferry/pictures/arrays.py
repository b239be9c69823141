"""Arrays and tensors as pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from kvferry.errors import InputError
from kvferry.pictures.header import check_size


def from_array(given: Any) -> Image.Image:
    """A picture of mode L, RGB or RGBA of an array, or of anything that turns into one.

    Parameters
    ----------
    given : array ``[height, width]`` or ``[height, width, 1, 3 or 4]``
        uint8, uint16, bool, or float in 0..1; the fourth channel is opacity.

    Raises
    ------
    InputError
        Another shape or dtype, channels that come first, or a tensor that numpy cannot read.
    """
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, in bfloat16, or with a gradient
        reason = str(error).partition(".")[0]
        raise InputError(
            f"a {type(given).__name__} cannot be read as a picture ({reason}); pass tensor.detach().float().cpu()"
        ) from None
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    _check_shape(array)
    return Image.fromarray(np.ascontiguousarray(_levels(array)))


def _check_shape(array: npt.NDArray[Any]) -> None:
    shape = list(array.shape)
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[-1] not in (3, 4):
        raise InputError(
            f"an array of shape {shape} has its channels first; pass [height, width, {shape[0]}], as "
            "array.transpose(1, 2, 0) gives it (permute, for a tensor)"
        )
    if array.ndim == 4:
        raise InputError(f"an array of shape {shape} is a batch; pass one picture at a time, [height, width, 3]")
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[-1] not in (3, 4)) or not array.size:
        raise InputError(f"an array of shape {shape} is not a picture; pass [height, width, 3]")
    check_size(shape[1], shape[0])


def _levels(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The same in 256 levels."""
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InputError("a float picture must hold values from 0 to 1; divide by 255 or pass uint8")
        return np.asarray((array.astype(np.float32) * 255).round(), np.uint8)
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return (array.astype(np.float32) / 257).round().astype(np.uint8)
    raise InputError(f"an array of {array.dtype} is not a picture; pass uint8, uint16, bool or float in 0..1")
