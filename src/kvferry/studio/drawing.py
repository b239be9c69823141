"""What of a picture was kept, as pixels one can see."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 720
"""Pixels along the longer side of what is shown."""
DIM = 0.22
"""How bright a dropped patch stays: enough to know where one is."""
EDGE = np.array([230, 159, 0], np.float32) / 255
"""Around kept patches; with the colours of HEAT from the palette of docs/figures (Okabe and Ito)."""
HEAT = np.array([[20, 40, 60], [0, 114, 178], [0, 158, 115], [230, 159, 0], [255, 236, 158]], np.float32) / 255

Share = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.float32]


def lit(image: Image.Image, share: Share) -> Pixels:
    """Kept patches in their colours inside a bright edge, dropped ones dim and grey.

    Parameters
    ----------
    share : float32 ``[rows, columns]``
        0 where no head keeps the patch, 1 where all do.

    Returns
    -------
    float32 ``[height, width, 3]`` in 0..1, at most :data:`SIDE` pixels long
    """
    light = _pixels(image)
    cells = _spread(np.where(share > 0, 0.5 + 0.5 * share, 0).astype(np.float32), light)[..., None]
    dark = DIM * light.mean(-1, keepdims=True)
    pixels: Pixels = dark + (light - dark) * cells
    kept = _spread((share > 0).astype(np.float32), light) > 0
    pixels[_edges(kept)] = EDGE
    return pixels


def heat(image: Image.Image, share: Share) -> Pixels:
    """The picture in grey under a colour that says how large a share of layers and heads keeps each patch."""
    light = _pixels(image)
    cells = _spread(share, light)
    colours = heat_colour(cells)
    grey = light.mean(-1, keepdims=True)
    cover = np.where(cells > 0, 0.6 + 0.4 * cells, 0.0)[..., None].astype(np.float32)
    pixels: Pixels = (1 - cover) * 0.4 * grey + cover * colours * (0.5 + 0.5 * grey)
    return pixels


def heat_colour(share: Share) -> Pixels:
    """Colours for shares from 0 to 1, one more axis of 3; the root of a share, so that small ones can be told apart."""
    at = np.sqrt(np.clip(share, 0, 1)) * (len(HEAT) - 1)
    low = np.minimum(at.astype(np.int64), len(HEAT) - 2)
    part = (at - low)[..., None].astype(np.float32)
    colours: Pixels = HEAT[low] * (1 - part) + HEAT[low + 1] * part
    return colours


def plain(image: Image.Image) -> Pixels:
    """The picture as it is."""
    return _pixels(image)


def data_uri(pixels: Pixels, quality: int = 90) -> str:
    """JPEG in a ``data:`` address, so that a page needs no file."""
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=quality, subsampling=0
    )
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pixels(image: Image.Image) -> Pixels:
    """At the size that is shown; small pictures are scaled up by a whole number, so that patches stay sharp."""
    longest = max(image.size)
    scale = SIDE // longest if longest <= SIDE else SIDE / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pixels: Pixels = np.asarray(shown, np.float32) / np.float32(255)
    return pixels


def _spread(cells: Share, over: Pixels) -> Share:
    """``[rows, columns]`` as ``[height, width]``."""
    rows, columns = cells.shape
    height, width = over.shape[:2]
    spread: Share = cells[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    return spread


def _edges(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Two pixels along the inner side of every border of ``inside``."""
    padded = np.pad(inside, 2)
    core = inside.copy()
    for down in (0, 2, 4):
        for right in (0, 2, 4):
            core &= padded[down : down + inside.shape[0], right : right + inside.shape[1]]
    return inside & ~core
