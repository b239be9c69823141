"""Pictures as callers hand them in: PIL images, paths or arrays."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from kvferry.errors import InputError

MAX_PIXELS = 89_478_485
"""PIL's own limit for a picture that is not a decompression bomb."""
MAX_VISUAL_TOKENS = 16_384


def open_picture(picture: Any) -> Image.Image:
    """A fully decoded RGB image.

    Parameters
    ----------
    picture : PIL image, path, or array
        An array is ``[height, width]`` or ``[height, width, 1, 3 or 4]``, uint8 or float in 0..1.

    Raises
    ------
    InputError
        Not a picture, or more than :data:`MAX_PIXELS` pixels.
    """
    image = _decode(picture)
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"a picture of {image.width}x{image.height} pixels is too large; scale it down to {MAX_PIXELS:,} pixels"
        )
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"the picture cannot be decoded ({error}); pass an intact image file") from None


def _decode(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, (str, os.PathLike)):
        return _open_file(os.fspath(picture))
    if isinstance(picture, np.ndarray) or hasattr(picture, "__array__"):
        return _from_array(np.asarray(picture))
    raise InputError(f"a {type(picture).__name__} is not a picture; pass a PIL image, a path or an array")


def _open_file(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except Image.DecompressionBombError:
        raise InputError(f"{path} is too large; scale it down to {MAX_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise InputError(f"there is no picture at {path}; check the path") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that PIL can read; convert it to PNG or JPEG") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the file") from None


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or not array.size:
        raise InputError(f"an array of shape {list(array.shape)} is not a picture; pass [height, width, 3]")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InputError("a float picture must hold values from 0 to 1; divide by 255 or pass uint8")
        array = (array * 255).round()
    elif array.dtype != np.uint8:
        raise InputError(f"an array of {array.dtype} is not a picture; pass uint8 or float in 0..1")
    return Image.fromarray(array.astype(np.uint8))
