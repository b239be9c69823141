"""Which way of asking is the best, over bandwidth, context length and cloud load, from formula and public sizes.

This needs no measurement and replaces none: seconds come from counting operations and bytes, on machines that are
assumed. Quality plays no part. Points that were measured go into :func:`kvferry.policy.decide` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.link.trace import Array
from kvferry.policy.points import OperatingPoint
from kvferry.policy.situation import Context

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#9aa0a6", "#e8853f", "#c6dbf4", "#6aa5e3", "#1b5fa8")
JPEG_BYTES_PER_PIXEL = 225e3 / 1024**2
"""A 1024 x 1024 photo as JPEG: the middle of the usual 150 to 300 kB."""


@dataclass(frozen=True)
class Shape:
    """A model's public sizes.

    Parameters
    ----------
    layers, kv_heads, head_dim, hidden : int
        Of the language model.
    parameters, tower_parameters : float
        Of the language model and of the vision tower.
    pixels_per_token : int
        Pixels of the picture behind one visual token.
    patches_per_token : int
        Patches that the tower computes for it.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    parameters: float
    tower_parameters: float
    pixels_per_token: int
    patches_per_token: int

    @property
    def cache_bytes_per_token(self) -> int:
        """BF16, keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


SHAPES = (
    Shape("Qwen2-VL-2B", 28, 2, 128, 1536, 1.54e9, 0.665e9, 28 * 28, 4),
    Shape("Qwen2-VL-7B", 28, 4, 128, 3584, 7.62e9, 0.675e9, 28 * 28, 4),
    Shape("LLaVA-1.5-7B", 32, 32, 128, 4096, 6.74e9, 0.304e9, 14 * 14, 1),
)
"""From the models' configurations and papers (arXiv 2409.12191, 2310.03744)."""


@dataclass(frozen=True)
class Machines:
    """Assumed speeds. The defaults stand for an embedded GPU and for a data centre's at half its peak.

    Parameters
    ----------
    edge_flops, cloud_flops : float
        Operations per second that a prefill reaches.
    codec_bytes_per_second : float
        BF16 cache bytes that are encoded, or decoded, per second.
    rtt_seconds : float
    """

    edge_flops: float = 20e12
    cloud_flops: float = 150e12
    codec_bytes_per_second: float = 2e9
    rtt_seconds: float = 0.04

    def __str__(self) -> str:
        return (
            f"edge {self.edge_flops / 1e12:g} and cloud {self.cloud_flops / 1e12:g} TFLOP/s, codec "
            f"{self.codec_bytes_per_second / 1e9:g} GB/s, round trip {1000 * self.rtt_seconds:g} ms"
        )

    def __post_init__(self) -> None:
        if not (min(self.edge_flops, self.cloud_flops, self.codec_bytes_per_second) > 0 and self.rtt_seconds >= 0):
            raise InputError("machines have speeds above 0 and a round trip of 0 or more seconds")


@dataclass(frozen=True)
class Carried:
    """A way to carry a cache: its mode, the share of tokens it keeps, and the bits it takes per number."""

    mode: str
    kept: float
    bits: float


INT4_BITS = 4 + 16 / 128
"""With a 16-bit scale per vector of 128."""
CARRIED = (
    Carried("kv:full|bf16", 1.0, 16.0),
    Carried("kv:full|int4", 1.0, INT4_BITS),
    Carried("kv:vlcache@0.10|int4", 0.1, INT4_BITS),
)


def formula_points(
    shape: Shape, tokens: int, machines: Machines, carried: Sequence[Carried] = CARRIED, edge_holds_cache: bool = False
) -> tuple[OperatingPoint, ...]:
    """Points of ``image``, ``embeds`` (INT8) and carried caches for a prompt of ``tokens`` visual tokens.

    Parameters
    ----------
    edge_holds_cache : bool
        The edge has prefilled anyway, for an answer of its own or an earlier turn: tower and prefill cost nothing
        there.
    """
    tower = 2 * shape.tower_parameters * shape.patches_per_token * tokens
    prefill = 2 * shape.parameters * tokens + 2 * shape.layers * shape.hidden * tokens**2
    full = shape.cache_bytes_per_token * tokens
    codec = full / machines.codec_bytes_per_second
    here = 0.0 if edge_holds_cache else 1.0 / machines.edge_flops
    image = OperatingPoint(
        "image",
        1.0,
        round(JPEG_BYTES_PER_PIXEL * shape.pixels_per_token * tokens),
        cloud_seconds=(tower + prefill) / machines.cloud_flops,
        needs=("pixels",),
    )
    embeds = OperatingPoint(
        "embeds:int8",
        1.0,
        shape.hidden * tokens,
        edge_seconds=here * tower,
        cloud_seconds=prefill / machines.cloud_flops,
        needs=("embeds",),
    )
    caches = (
        OperatingPoint(
            x.mode, 1.0, round(full * x.kept * x.bits / 16), here * (tower + prefill), codec * x.kept, codec * x.kept
        )
        for x in carried
    )
    return (image, embeds, *caches)


def break_even_map(
    shape: Shape,
    mbit: Array,
    tokens: npt.NDArray[np.int64],
    load: float,
    machines: Machines,
    edge_holds_cache: bool = False,
    privacy: frozenset[str] = frozenset(),
) -> tuple[tuple[str, ...], npt.NDArray[np.int64], Array]:
    """The best mode everywhere: a cache only where it is faster than pixels and embeddings, and then the mildest such.

    Parameters
    ----------
    mbit : float64 ``[B]``
    tokens : int64 ``[N]``
    load : float
        Share of the time that the cloud's prefill is busy, below 1. What must be prefilled there waits
        ``load / (1 - load)`` times its own seconds, as in a queue with random arrivals (M/M/1).
    privacy : frozenset of str
        As in :class:`Context`.

    Returns
    -------
    modes : tuple of str
        The mildest cache first among the caches.
    best : int64 ``[N, B]``
        Index into ``modes``.
    seconds : float64 ``[N, B, modes]``
        To the first token; inf for what privacy forbids.

    Raises
    ------
    InputError
        A rate or length is not above 0, or the load is not below 1.
    """
    if not (0 <= load < 1 and (mbit > 0).all() and (tokens > 0).all()):
        raise InputError("a map needs rates and lengths above 0 and a load from 0 to below 1")
    rows = []
    for count in tokens.tolist():
        points = formula_points(shape, count, machines, edge_holds_cache=edge_holds_cache)
        contexts = [
            Context(
                86_400, machines.rtt_seconds, prefill_queue_seconds=load / (1 - load) * x.cloud_seconds, privacy=privacy
            )
            for x in points
        ]
        fixed = [np.inf if c.refusal(x) else c.fixed_seconds(x) for x, c in zip(points, contexts, strict=True)]
        sizes = np.array([point.nbytes for point in points], np.float64)
        rows.append(np.array(fixed) + 8 * sizes / (1e6 * mbit[:, None]))
    seconds = np.stack(rows)
    caches = np.array([x.kind == "kv" for x in points])
    others = np.where(caches, np.inf, seconds)
    wins = caches & (seconds < others.min(-1, keepdims=True))
    best = np.where(wins.any(-1), wins.argmax(-1), others.argmin(-1))
    return tuple(point.mode for point in points), best, seconds


def draw_maps(
    mbit: Array,
    tokens: npt.NDArray[np.int64],
    loads: Sequence[float],
    shapes: Sequence[Shape],
    machines: Machines,
    privacy: frozenset[str] = frozenset(),
) -> Figure:
    """One row per model; per load a map where the edge must prefill first, and one where it holds the cache already."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cases = [(load, held) for held in (False, True) for load in loads]
    figure = Figure(figsize=(2.9 * len(cases) + 0.5, 2.3 * len(shapes) + 1.2), layout="constrained")
    grid = figure.subplots(len(shapes), len(cases), squeeze=False, sharex=True, sharey=True)
    shades = ListedColormap(COLOURS)
    for shape, line in zip(shapes, grid, strict=True):
        for (load, held), axes in zip(cases, line, strict=True):
            modes, best, _ = break_even_map(shape, mbit, tokens, load, machines, held, privacy)
            norm = BoundaryNorm(np.arange(len(modes) + 1) - 0.5, len(COLOURS))
            axes.pcolormesh(mbit, tokens, best, cmap=shades, norm=norm, shading="nearest", rasterized=True)
            axes.set(xscale="log", yscale="log")
            axes.tick_params(labelsize=8)
            axes.set_title(f"{shape.name}, cloud {load:.0%} busy", fontsize=9, loc="left")
            if axes is line[0]:
                axes.set_ylabel("visual tokens", fontsize=9)
            if shape is shapes[-1]:
                axes.set_xlabel("Mbit/s, " + ("edge holds the cache" if held else "edge prefills"), fontsize=9)
    patches = [Patch(color=colour, label=mode) for colour, mode in zip(COLOURS, modes, strict=False)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    rules = "".join(f", {rule}" for rule in sorted(privacy))
    figure.suptitle(
        f"Where a cache beats the rest to the first token, by formula ({machines}{rules})",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    return figure
