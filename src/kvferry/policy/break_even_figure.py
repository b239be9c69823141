"""The break-even maps as one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvferry.codecs import BF16, Transform
from kvferry.link.trace import Array
from kvferry.policy.break_even import (
    Machines,
    Shape,
    break_even_map,
    formula_points,
    is_cache,
    measured_points,
)
from kvferry.policy.points import OperatingPoint, PointTable
from kvferry.recipe import Recipe
from kvferry.selection.full import Full

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WAYS = {
    "image": ("#d9d9d9", "the JPEG"),
    "embeds": ("#e8853f", "visual embeddings"),
    "bf16": ("#cfe3f7", "whole cache, 16 bits a number"),
    "bits": ("#7fb2e5", "whole cache, 3 to 8 bits"),
    "kept": ("#2f6fb3", "part of the tokens, integers"),
    "transform": ("#123a66", "transform-coded cache"),
}
"""Colour and name of what is sent; caches are the darker the more is taken off them."""
TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
"""Of the cloud's load; drawn at equal steps of the waiting time's logarithm, ``1 / (1 - load)``."""
STYLES = ("--", ":", "-.")
LABELS = {"image": "send the JPEG", "embeds": "send embeddings", "kv": "send a cache"}
WIDE = 4
"""Width of a region's name by its height, in cells of the map."""
LABELLED = 0.05
"""Share of a map from which on a region bears its name."""

Source = Callable[[int], tuple[OperatingPoint, ...]]


@dataclass(frozen=True)
class Panel:
    """One map: what it is of, and its points at a number of visual tokens.

    Parameters
    ----------
    lengths : tuple of int
        Numbers of visual tokens; only 0 where the points were measured, and are of one length.
    """

    title: str
    held: bool
    points: Source
    lengths: tuple[int, ...]


def way_of(point: OperatingPoint) -> str:
    """The one of :data:`WAYS` that a point belongs to."""
    if not is_cache(point):
        return point.kind
    recipe = Recipe.parse(point.mode.partition(":")[2])
    if isinstance(recipe.codec, Transform):
        return "transform"
    if not isinstance(recipe.selection, Full):
        return "kept"
    return "bf16" if isinstance(recipe.codec, BF16) else "bits"


def panels(
    shapes: Sequence[Shape], lengths: Sequence[int], machines: Machines, table: PointTable | None
) -> list[list[Panel]]:
    """A row where the edge must prefill first, and one where it holds the cache already."""
    rows = []
    for held in (False, True):
        row = [Panel(f"{x.name}\n(formula)", held, _by_formula(x, machines, held), tuple(lengths)) for x in shapes]
        if table is not None:
            row.append(Panel(f"{table.name}\n(measured)", held, _as_measured(table, held), (0,)))
        rows.append(row)
    return rows


def _by_formula(shape: Shape, machines: Machines, held: bool) -> Source:
    return lambda tokens: formula_points(shape, tokens, machines, edge_holds_cache=held)


def _as_measured(table: PointTable, held: bool) -> Source:
    points = measured_points(table, held)
    return lambda tokens: points


def draw_maps(
    rows: Sequence[Sequence[Panel]],
    mbit: Array,
    load: Array,
    machines: Machines,
    privacy: frozenset[str] = frozenset(),
) -> Figure:
    """Filled for the first length; the border between cache and no cache also for the others."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = len(rows[0])
    figure = Figure(figsize=(max(7.0, 3.0 * columns + 0.9), 7.4), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    used: set[str] = set()
    for line, axes_line in zip(rows, grid, strict=True):
        for panel, axes in zip(line, axes_line, strict=True):
            used |= _fill(axes, panel, mbit, load, machines.rtt_seconds, privacy)
            _borders(axes, panel, mbit, load, machines.rtt_seconds, privacy)
            if line is rows[0]:
                axes.set_title(panel.title, fontsize=10.5)
            else:
                axes.set_xlabel("uplink, Mbit/s", fontsize=10)
        begin = "edge holds the cache already\n" if line[0].held else "edge must prefill first\n"
        axes_line[0].set_ylabel(f"{begin}cloud's prefill is busy", fontsize=10)
    axes = grid[0, 0]
    axes.set_yticks([1 / (1 - x) for x in TICKS], [f"{x:.0%}" for x in TICKS])
    axes.minorticks_off()
    handles: list[Patch | Line2D] = [Patch(color=c, label=n) for way, (c, n) in WAYS.items() if way in used]
    first, *others = rows[0][0].lengths
    handles.append(Line2D([], [], color="black", linewidth=2, label=f"JPEG or cache: {first:,} visual tokens"))
    for length, style in zip(others, STYLES, strict=False):
        handles.append(Line2D([], [], color="black", linestyle=style, linewidth=1.2, label=f"the same at {length:,}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(2, columns), fontsize=9.5, frameon=False)
    rules = "".join(f", {rule}" for rule in sorted(privacy))
    figure.suptitle(
        "What brings the first answer token soonest: the picture as JPEG, or its KV cache?\n"
        f"Of caches, the mildest that beats the JPEG{rules}",
        fontsize=11,
    )
    return figure


def _fill(axes: Axes, panel: Panel, mbit: Array, load: Array, rtt: float, privacy: frozenset[str]) -> set[str]:
    """The map for the first length; returns what is sent somewhere in it."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    points = panel.points(panel.lengths[0])
    best, _ = break_even_map(points, mbit, load, rtt, privacy)
    names = list(WAYS)
    ways = np.array([names.index(way_of(x)) for x in points])[best]
    shades = ListedColormap([colour for colour, _ in WAYS.values()])
    norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
    axes.pcolormesh(mbit, 1 / (1 - load), ways, cmap=shades, norm=norm, shading="nearest", rasterized=True)
    axes.set(xscale="log", yscale="log", xlim=(mbit[0], mbit[-1]), ylim=(1, 1 / (1 - load[-1])))
    axes.tick_params(labelsize=9)
    kinds = np.array([x.kind for x in points])[best]
    for kind, text in LABELS.items():
        if (kinds == kind).mean() > LABELLED:
            _label(axes, kinds == kind, text, mbit, load)
    return {names[i] for i in np.unique(ways)}


def _label(axes: Axes, region: npt.NDArray[np.bool_], text: str, mbit: Array, load: Array) -> None:
    """``text`` where the region is the deepest."""
    row, column = _deepest(region)
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axes.text(mbit[column], 1 / (1 - load[row]), text, ha="center", va="center", fontsize=10, bbox=box)


def _deepest(region: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """A cell that is left last when a region is eaten from its edge; from the sides faster, for words are wide."""
    while True:
        padded = np.pad(region, ((1, 1), (WIDE, WIDE)))
        middle = padded[:, WIDE:-WIDE]
        left = region & middle[:-2] & middle[2:] & padded[1:-1, : -2 * WIDE] & padded[1:-1, 2 * WIDE :]
        if not left.any():
            break
        region = left
    rows, columns = np.nonzero(region)
    return int(rows[len(rows) // 2]), int(columns[len(rows) // 2])


def _borders(axes: Axes, panel: Panel, mbit: Array, load: Array, rtt: float, privacy: frozenset[str]) -> None:
    """Where a cache begins to win, for every length."""
    styles = [("-", 2.0), *((style, 1.2) for style in STYLES)]
    for length, (style, width) in zip(panel.lengths, styles, strict=False):
        points = panel.points(length)
        best, _ = break_even_map(points, mbit, load, rtt, privacy)
        wins = np.array([is_cache(x) for x in points], np.float64)[best]
        if 0 < wins.mean() < 1:
            axes.contour(mbit, 1 / (1 - load), wins, [0.5], colors="black", linestyles=style, linewidths=width)
