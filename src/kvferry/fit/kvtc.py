"""What a model's caches look like: the profile of the ``kvtc`` codec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.analyze.source import Asked
from kvferry.codecs.kvtc import SINKS, sides
from kvferry.codecs.profile import Axes, PlainProfile
from kvferry.errors import InputError
from kvferry.evidence import Prefilled
from kvferry.fit.axes import captured, principal_axes
from kvferry.fit.rows import rows_of
from kvferry.fit.transform import Reservoir
from kvferry.lazy import torch
from kvferry.recipe import Recipe

if TYPE_CHECKING:
    from kvferry.models import VLM


class PlainCalibration:
    """Takes questions one by one, then makes the profile: plain principal axes, as KVTC has them (arXiv 2511.01815).

    Parameters
    ----------
    recipe : Recipe
        Its selection is applied first. All layers and heads must keep the same tokens.
    rank : int
        Axes of keys, and of values, at most.
    most : int, optional
        Tokens that are kept to find them.
    """

    def __init__(self, vlm: VLM, recipe: Recipe, rank: int, seed: int = 0, most: int | None = None) -> None:
        self._vlm, self._recipe, self._rank = vlm, recipe, rank
        self._vectors = Reservoir(np.random.default_rng(seed), most)
        self.n = 0

    def add(self, asked: Asked) -> None:
        """Look at one question's cache; its sinks are left out, for they are not coded by axes."""
        prefilled = self._vlm.prefill(asked.images, asked.question, context=asked.context, recipe=self._recipe)
        self.take(prefilled, asked.name)

    def take(self, prefilled: Prefilled, name: str) -> None:
        """As :meth:`add`, of a question that was read already."""
        rows, index = rows_of(self._vlm, self._recipe.keep(prefilled), name)
        self._vectors.add(rows[torch.from_numpy(index >= SINKS)], index[index >= SINKS])
        self.n += 1

    def profile(self, facts: dict[str, Any]) -> PlainProfile:
        """The profile of all questions so far.

        Raises
        ------
        InputError
            There was none.
        """
        if not self._vectors.rows:
            raise InputError(
                f"calibration needs questions of which more than the first {SINKS} tokens are kept; give it some (--n)"
            )
        vlm = self._vlm
        shares: dict[str, float] = {}
        both = zip(("keys", "values"), sides(torch.stack(self._vectors.rows), vlm.head_dim), strict=True)
        keys, values = (self._axes(name, x, shares) for name, x in both)
        shape = (vlm.layers, vlm.kv_heads, vlm.head_dim)
        return PlainProfile(vlm.fingerprint, keys, values, vlm.rotary, shape, facts | {"captured": shares})

    def _axes(self, name: str, x: torch.Tensor, shares: dict[str, float]) -> Axes:
        """Those of one side; the share of energy that they capture goes to ``shares``."""
        off = x - x.mean(0)
        axes, octaves = principal_axes(off, self._rank)
        shares[name] = round(captured(off, axes), 6)
        return Axes(x.mean(0), axes, octaves)
