"""How much kept sets have in common: between scorers, between layers, between two models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.analyze.observe import FRACTIONS, Observation
from kvferry.analyze.running import Array, Reservoir, Running
from kvferry.errors import InputError
from kvferry.selection import Selection

Bools = npt.NDArray[np.bool_]


def members(selection: Selection, length: int) -> Bools:
    """Which tokens each layer and head keeps, bool ``[layers, heads, length]``."""
    layers = range(len(selection.positions))
    kept = np.zeros((len(layers), len(selection.heads(0)), length), bool)
    for layer in layers:
        for head, positions in zip(kept[layer], selection.heads(layer), strict=True):
            head[positions.cpu().numpy()] = True
    return kept


def likeness(first: Bools, second: Bools) -> Array:
    """Overlap ``|A and B| / k`` and Jaccard ``|A and B| / |A or B|`` of every pair of sets.

    ``[..., a, n]`` and ``[..., b, n]`` to ``[2, ..., a, b]``; ``k`` is the smaller set's size, where they differ.
    """
    x, y = first.astype(np.float32), second.astype(np.float32)
    both = x @ np.swapaxes(y, -1, -2)
    one, other = x.sum(-1)[..., :, None], y.sum(-1)[..., None, :]
    found: Array = np.stack([both / np.minimum(one, other), both / (one + other - both)]).astype(np.float64)
    return found


@dataclass(frozen=True)
class OverlapResult:
    """Mean likeness of kept sets; the leading axis is overlap, Jaccard; fractions are those of ``FRACTIONS``.

    Parameters
    ----------
    scorers : tuple of str
    between_scorers : ``[2, fractions, scorers, scorers]``
        In the same layer and head.
    between_layers : ``[2, fractions, scorers, layers, layers]``
        Mean over all pairs of a head here and a head there.
    between_models : ``[2, fractions, scorers]``
        Mean over all pairs of a layer and head of one model and one of the other; NaN without a second model.
    samples : ``[n, 2, fractions, scorers]``
        The same per prompt.
    """

    scorers: tuple[str, ...]
    between_scorers: Array
    between_layers: Array
    between_models: Array
    samples: Array


class Overlap:
    """Compares which tokens stay. ``random`` among the scorers shows what chance and the sinks alone would give."""

    def __init__(self, scorers: tuple[str, ...]) -> None:
        self._scorers = scorers
        self._between_scorers, self._between_layers, self._between_models = Running(), Running(), Running()
        self._samples = Reservoir()

    def add(self, seen: Observation, other: Observation | None = None) -> None:
        """One prompt, and how the second model read it.

        Raises
        ------
        InputError
            The two models do not read it as the same tokens.
        """
        if other is not None:
            check_same_prompt(seen, other)
        mine = self._members(seen)
        self._between_scorers.add(np.stack([_scorer_pairs(x) for x in mine], axis=1))
        self._between_layers.add(np.stack([_layer_pairs(x) for x in mine], axis=1))
        if other is None:
            return
        theirs = self._members(other)
        pairs = np.stack([_model_pairs(x, y) for x, y in zip(mine, theirs, strict=True)], axis=1)
        self._between_models.add(pairs)
        self._samples.add(pairs)

    def _members(self, seen: Observation) -> list[Bools]:
        """Per fraction ``[scorers, layers, heads, length]``."""
        length = seen.cache.length
        return [np.stack([members(seen.choices[s][f], length) for s in self._scorers]) for f in FRACTIONS]

    def result(self) -> OverlapResult:
        """What was found so far."""
        shape = (2, len(FRACTIONS), len(self._scorers))
        return OverlapResult(
            self._scorers,
            self._between_scorers.mean,
            self._between_layers.mean,
            np.broadcast_to(self._between_models.mean, shape).copy(),
            self._samples.rows,
        )


def check_same_prompt(seen: Observation, other: Observation) -> None:
    """Refuse to compare positions that do not mean the same."""
    a, b = seen.cache.layout, other.cache.layout
    if a.grids != b.grids:
        raise InputError(
            f"{seen.asked.name}: the models see the pictures as {list(a.grids)} and {list(b.grids)} tokens; "
            "--against takes a model with the same patch grid"
        )
    if not np.array_equal(a.token_ids, b.token_ids):
        raise InputError(
            f"{seen.asked.name}: the models read it as different tokens ({len(a)} and {len(b)}); "
            "--against takes a model with the same tokenizer and template"
        )


def _scorer_pairs(kept: Bools) -> Array:
    """``[scorers, layers, heads, n]`` to ``[2, scorers, scorers]``."""
    mean: Array = likeness(kept.transpose(1, 2, 0, 3), kept.transpose(1, 2, 0, 3)).mean((1, 2))
    return mean


def _layer_pairs(kept: Bools) -> Array:
    """``[scorers, layers, heads, n]`` to ``[2, scorers, layers, layers]``."""
    scorers, layers, heads, n = kept.shape
    flat = kept.reshape(scorers, layers * heads, n)
    mean: Array = likeness(flat, flat).reshape(2, scorers, layers, heads, layers, heads).mean((3, 5))
    return mean


def _model_pairs(mine: Bools, theirs: Bools) -> Array:
    """``[scorers, layers, heads, n]`` of both models to ``[2, scorers]``."""
    n = mine.shape[-1]
    flat = [x.reshape(len(x), -1, n) for x in (mine, theirs)]
    mean: Array = likeness(*flat).mean((2, 3))
    return mean
