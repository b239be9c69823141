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
from kvferry.files import write_whole
from kvferry.palette import ACCENT, INK, PALE, QUIET
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
    """The picture with what was dropped washed out: kept cells in full colour, the paler the fewer heads keep them.

    The cell that most (layer, head) pairs keep is in full colour, so that few kept tokens can be seen as well as many.

    Parameters
    ----------
    share : ``[rows, columns]`` in 0..1

    Returns
    -------
    float32 ``[height, width, 3]`` in 0..1
    """
    colour = np.asarray(open_picture(image), np.float32) / 255
    lit = _per_pixel(np.sqrt(share / max(float(share.max()), 1e-9)), colour.shape[:2])[..., None]
    washed = 1 - 0.22 * (1 - colour.mean(-1, keepdims=True))
    pixels: npt.NDArray[np.float32] = np.clip(washed + (colour - washed) * lit, 0, 1)
    return pixels


def _per_pixel(cells: npt.NDArray[np.float32], size: tuple[int, ...]) -> npt.NDArray[np.float32]:
    (rows, columns), (height, width) = cells.shape, size
    found: npt.NDArray[np.float32] = cells[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    return found


def draw_kept(axes: Axes, image: Image, share: npt.NDArray[np.float32], title: str) -> None:
    """:func:`lit_pixels` as a titled panel, with a line around the cells that at least half of the most keep."""
    axes.imshow(lit_pixels(image, share), interpolation="nearest")
    if share.min() < share.max():
        strong = _per_pixel((share >= share.max() / 2).astype(np.float32), (image.height, image.width))
        axes.contour(strong, levels=[0.5], colors=ACCENT, linewidths=1.4)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(QUIET)


def draw_crossing(
    out: Path,
    image: Image,
    question: str,
    shares: Sequence[tuple[str, npt.NDArray[np.float32]]],
    rows: Sequence[tuple[str, float, float]],
    n: int,
) -> None:
    """The demo's picture: the scene, what each recipe kept of it, and below what every way cost and was worth.

    Parameters
    ----------
    shares : sequence of (recipe, share ``[rows, columns]``)
    rows : sequence of (name, mean bytes on the wire, accuracy in [0, 1])
    n : int
        Questions behind the bars.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 * (len(shares) + 1), 7.6), layout="constrained")
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[1.1, 1.0]))
    panels = top.subplots(1, len(shares) + 1)
    draw_kept(panels[0], image, np.ones((1, 1), np.float32), "what the edge sees")
    for panel, (name, share) in zip(panels[1:], shares, strict=True):
        draw_kept(panel, image, share, name)
        panel.set_xlabel(f"in colour: the {share.mean():.0%} that are kept", fontsize=10, loc="left")
    top.suptitle(question, fontsize=11, x=0.01, ha="left", color=INK)
    _draw_ways(bottom.subplots(), rows, n)
    figure.suptitle(_finding(rows, n), fontsize=13, x=0.01, ha="left", fontweight="bold")
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format=out.suffix[1:] or "png", metadata={"Software": None})
    write_whole(out, drawn.getvalue())


def _finding(rows: Sequence[tuple[str, float, float]], n: int) -> str:
    """The smallest cache that answers as well as the picture, beside the picture."""
    picture = next(r for r in rows if r[0].startswith("image"))
    good = [r for r in rows if r is not picture and r[2] >= picture[2]]
    if not good:
        return f"No cache here answers as many of {n} questions as the JPEG"
    least = min(good, key=lambda r: r[1])
    answers = f"A cache of {least[1]:,.0f} bytes answers {least[2] * n:.0f} of {n} questions"
    return f"{answers}, the JPEG takes {picture[1]:,.0f}"


def _draw_ways(axes: Axes, rows: Sequence[tuple[str, float, float]], n: int) -> None:
    """A bar a way, its bytes, and how many answers were right; pale where that is fewer than the picture's."""
    picture = next(r for r in rows if r[0].startswith("image"))
    colours = [INK if r is picture else ACCENT if r[2] >= picture[2] else PALE for r in rows]
    bars = axes.barh([r[0] for r in rows], [r[1] for r in rows], color=colours, height=0.72)
    axes.bar_label(
        bars, labels=[f"{r[1]:,.0f} B, {r[2] * n:.0f} of {n} right" for r in rows], padding=4, fontsize=9.5, color=INK
    )
    axes.set_xscale("log")
    axes.set_xlim(right=max(r[1] for r in rows) * 12)
    axes.set_xlabel("bytes on the wire (log); pale: fewer right answers than from the JPEG", fontsize=10)
    axes.invert_yaxis()
    axes.tick_params(labelsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
