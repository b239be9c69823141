"""Which way of asking is the best, over bandwidth, context length and cloud load, from formula and public sizes.

Points by formula need no measurement and replace none: seconds come from counting operations and bytes, on machines
that are assumed, and quality plays no part. Points of ``kvferry profile`` make the same map from what was measured. One
question is decided by :func:`kvferry.policy.decide`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.link.trace import Array
from kvferry.policy.points import OperatingPoint, PointTable
from kvferry.policy.situation import Context

KEPT = 0.98
"""The share of the best quality in a table that a point must be able to have to be sent."""
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

    Raises
    ------
    InputError
        ``tokens`` is not above 0.
    """
    if tokens < 1:
        raise InputError(f"a picture has one visual token or more, not {tokens}")
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
        prefill_seconds=(tower + prefill) / machines.cloud_flops,
    )
    embeds = OperatingPoint(
        "embeds:int8",
        1.0,
        shape.hidden * tokens,
        edge_seconds=here * tower,
        cloud_seconds=prefill / machines.cloud_flops,
        needs=("embeds",),
        prefill_seconds=prefill / machines.cloud_flops,
    )
    caches = (
        OperatingPoint(
            x.mode, 1.0, round(full * x.kept * x.bits / 16), here * (tower + prefill), codec * x.kept, codec * x.kept
        )
        for x in carried
    )
    return (image, embeds, *caches)


def break_even_map(
    points: Sequence[OperatingPoint],
    mbit: Array,
    load: Array,
    rtt_seconds: float = 0.0,
    privacy: frozenset[str] = frozenset(),
) -> tuple[npt.NDArray[np.int64], Array]:
    """The best point everywhere: a cache only where it is faster than all that is none, and then the mildest such.

    Parameters
    ----------
    points : sequence of OperatingPoint
        By :func:`formula_points` or :func:`measured_points`; the mildest cache is the first.
    mbit : float64 ``[B]``
    load : float64 ``[K]``
        Share of the time that the cloud's prefill is busy, below 1. What must be prefilled there waits
        ``load / (1 - load)`` times its own seconds of prefill, as in a queue with random arrivals (M/M/1).
    privacy : frozenset of str
        As in :class:`Context`.

    Returns
    -------
    best : int64 ``[K, B]``
        Index into ``points``.
    seconds : float64 ``[K, B, points]``
        Inf for what privacy forbids.

    Raises
    ------
    InputError
        A rate is not above 0, a load is not below 1, or nothing is allowed.
    """
    if not ((load >= 0).all() and (load < 1).all() and (mbit > 0).all()):
        raise InputError("a map needs rates above 0 and loads from 0 to below 1")
    context = Context(86_400, rtt_seconds, privacy=privacy)
    fixed = np.array([np.inf if context.refusal(x) else context.fixed_seconds(x) for x in points])
    if not np.isfinite(fixed).any():
        raise InputError("the rules leave no point; allow one")
    waiting = np.outer(load / (1 - load), [x.prefill_seconds for x in points])
    sizes = np.array([point.nbytes for point in points], np.float64)
    seconds = (fixed + waiting)[:, None] + (8 * sizes / (1e6 * mbit[:, None]))[None]
    caches = np.array([is_cache(x) for x in points])
    others = np.where(caches, np.inf, seconds)
    wins = caches & (seconds < others.min(-1, keepdims=True))
    best = np.where(wins.any(-1), wins.argmax(-1), others.argmin(-1))
    return best, seconds


def is_cache(point: OperatingPoint) -> bool:
    """Whether a cache is carried."""
    return point.kind == "kv"


def measured_points(table: PointTable, edge_holds_cache: bool = False) -> tuple[OperatingPoint, ...]:
    """Pictures, embeddings and caches of a table by ``kvferry profile``, the largest first.

    What surely answers worse than :data:`KEPT` of the best of them (its interval ends below) is left out, and so is
    what needs a session.

    Parameters
    ----------
    edge_holds_cache : bool
        As for :func:`formula_points`.
    """
    usable = [x for x in table.points if x.kind in ("image", "embeds", "kv") and "held_picture" not in x.needs]
    least = KEPT * max((x.quality for x in usable), default=0.0)
    good = sorted((x for x in usable if max((x.quality, *x.interval)) >= least), key=lambda x: -x.nbytes)
    if not good or all(map(is_cache, good)) or not any(map(is_cache, good)):
        raise InputError(f"the table {table.name} needs a cache and a picture to compare; measure kv and image modes")
    if not edge_holds_cache:
        return tuple(good)
    return tuple(x if x.kind == "image" else replace(x, edge_seconds=0.0) for x in good)
