"""A picture with the tokens that were kept, and what a picture costs as JPEG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvferry.cache import KVCache
from kvferry.errors import InputError
from kvferry.pictures import open_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

JPEG_QUALITY = 90


def jpeg_bytes(image: Image, quality: int = JPEG_QUALITY) -> bytes:
    """The picture as baseline JPEG, 4:2:0, optimised tables."""
    buffer = io.BytesIO()
    open_picture(image).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def kept_share(cache: KVCache, picture: int = 0) -> npt.NDArray[np.float32]:
    """Share of (layer, head) pairs that keep each visual token of one picture, float32 ``[rows, columns]``.

    For a video, the mean over its frames.

    Raises
    ------
    InputError
        The prompt has no such picture, or its family does not place tokens on a grid.
    """
    grids = cache.layout.grids
    if not 0 <= picture < len(grids):
        raise InputError(f"the prompt has {len(grids)} pictures with a token grid; there is no number {picture}")
    counts = np.zeros(cache.length, np.float32)
    pairs = 0
    for layer in cache:
        positions = layer.positions.cpu().numpy()
        np.add.at(counts, positions.ravel(), 1.0)
        pairs += layer.heads
    visual = np.flatnonzero(cache.layout.visual[: cache.length])
    sizes = [int(np.prod(g)) for g in grids]
    start = sum(sizes[:picture])
    share = counts[visual[start : start + sizes[picture]]] / pairs
    mean: npt.NDArray[np.float32] = share.reshape(grids[picture]).mean(0)
    return mean


def lit_pixels(image: Image, share: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Darken what was dropped: the brighter a cell, the more layers and heads keep it.

    ``share`` is ``[rows, columns]`` in 0..1; the result float32 ``[height, width, 3]`` in 0..1.
    """
    light = np.asarray(open_picture(image), np.float32) / 255
    rows, columns = share.shape
    height, width = light.shape[:2]
    lit = share[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    grey = light.mean(-1, keepdims=True) * 0.30
    pixels: npt.NDArray[np.float32] = np.clip(grey + (light - grey) * lit[..., None], 0, 1)
    return pixels


def draw_kept(axes: Axes, image: Image, share: npt.NDArray[np.float32], title: str) -> None:
    """:func:`lit_pixels` as a titled panel."""
    axes.imshow(lit_pixels(image, share), interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_crossing(
    out: Path,
    image: Image,
    question: str,
    shares: Sequence[tuple[str, npt.NDArray[np.float32]]],
    rows: Sequence[tuple[str, float, float]],
    n: int,
) -> None:
    """The demo's picture: the scene, what each recipe kept of it, and the bytes/accuracy bars.

    Parameters
    ----------
    shares : sequence of (recipe, share ``[rows, columns]``)
    rows : sequence of (name, mean bytes on the wire, accuracy in [0, 1])
    n : int
        Questions behind the bars.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * (len(shares) + 1), 6.4), layout="constrained")
    grid = figure.add_gridspec(2, len(shares) + 1, height_ratios=[1.15, 1])
    original = figure.add_subplot(grid[0, 0])
    draw_kept(original, image, np.ones((1, 1), np.float32), "what the edge sees")
    original.set_xlabel(question, fontsize=9, wrap=True)
    for column, (name, share) in enumerate(shares, start=1):
        draw_kept(figure.add_subplot(grid[0, column]), image, share, f"{name}\n{share.mean():.0%} of it kept")
    half = (len(shares) + 1) // 2
    names = [r[0] for r in rows]
    colours = ["#7f7f7f" if r[0].startswith("image") else "#1f77b4" for r in rows]
    size = figure.add_subplot(grid[1, :half])
    bars = size.barh(names, [r[1] / 1e3 for r in rows], color=colours)
    size.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    size.set_xlabel("kB on the wire (log)")
    size.set_xscale("log")
    size.margins(x=0.15)
    accuracy = figure.add_subplot(grid[1, half:], sharey=size)
    bars = accuracy.barh(names, [100 * r[2] for r in rows], color=colours)
    accuracy.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    accuracy.set_xlabel(f"right answers in % of {n} questions")
    accuracy.set_xlim(0, 112)
    accuracy.tick_params(labelleft=False)
    size.invert_yaxis()
    for axes in (size, accuracy):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("kvferry: a picture's cache, carried", fontsize=12, x=0.01, ha="left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
