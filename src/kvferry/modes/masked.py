"""Pictures whose unneeded patches are flattened, so that a JPEG spends next to nothing on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from kvferry.errors import UnsupportedModelError
from kvferry.pictures import open_picture

Grid = tuple[int, int, int]
Mask = npt.NDArray[np.bool_]


def flatten(pictures: Sequence[Image.Image], mask: Mask, grids: Sequence[Grid]) -> list[Image.Image]:
    """The pictures with every visual token's patch that ``mask`` drops painted in the picture's mean colour.

    A patch is as large as its share of the picture; pixels that a kept token touches stay. One colour for all of a
    picture costs a JPEG less than each patch's own mean: blocks that follow each other do not differ at all.

    Parameters
    ----------
    mask : bool ``[visual tokens]``
        Of all pictures, in prompt order.
    grids : sequence of (frames, rows, columns)
        In tokens, one per picture.

    Raises
    ------
    UnsupportedModelError
        The model does not say where its visual tokens stand.
    """
    if len(grids) != len(pictures) or sum(math.prod(grid) for grid in grids) != len(mask):
        raise UnsupportedModelError(
            "this model does not say where its visual tokens stand in a picture, so nothing can be flattened; use mode "
            "image without mask"
        )
    sizes = np.cumsum([math.prod(grid) for grid in grids])[:-1]
    parts = zip(pictures, np.split(mask, sizes), grids, strict=True)
    return [_flatten(open_picture(picture), part, grid) for picture, part, grid in parts]


def _flatten(picture: Image.Image, mask: Mask, grid: Grid) -> Image.Image:
    pixels = np.asarray(picture)
    kept: Mask = np.any(mask.reshape(grid), axis=0)
    keep = _grown(kept, picture.height, picture.width)
    mean = pixels.reshape(-1, 3).mean(0).round().astype(np.uint8)
    return Image.fromarray(np.where(keep[..., None], pixels, mean))


def _grown(kept: Mask, height: int, width: int) -> Mask:
    """The pixels that kept tokens touch, bool ``[height, width]``."""
    rows, columns = kept.shape
    down, right = _touched(rows, height), _touched(columns, width)
    touched: Mask = (down.T.astype(int) @ kept.astype(int) @ right.astype(int)) > 0
    return touched


def _touched(tokens: int, pixels: int) -> Mask:
    """Which pixels each of ``tokens`` equal stretches of a line touches, bool ``[tokens, pixels]``."""
    edges = np.arange(tokens + 1) * pixels / tokens
    pixel = np.arange(pixels)
    found: Mask = (pixel + 1 > edges[:-1, None]) & (pixel < edges[1:, None])
    return found
