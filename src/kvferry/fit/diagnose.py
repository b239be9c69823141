"""Which layers suffer from few bits, and the widths that follow: the sources' recipe, or the best within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from kvferry.codecs.mixed import PARTS, part_size
from kvferry.errors import BudgetError
from kvferry.fit.allocate import Ints, allocate
from kvferry.fit.damage import Damage, Plan, Question, alone, measure, uniform
from kvferry.statistics import mean_interval, ratio_interval

if TYPE_CHECKING:
    from kvferry.models import VLM

MAX_LOSS = 0.05
"""Uniform quantization is good enough up to this loss (paper A, W.-L. Cheng and W. Liao 2026)."""
BOTTLENECK_LOSS = 0.03
"""A layer whose quantization alone loses more is a bottleneck (paper A)."""
MOST_BOTTLENECKS = 0.25
"""Damage is distributed where more than this share of the layers are bottlenecks. The sources give no number: theirs
are one layer of 28, and "many"."""
CHOICES = (1, 2, 3, 4, 8, 16)
"""Bits that the allocation chooses from."""
UNIFORM = (8, 4, 3, 2)
"""Bits of the uniform widths that profiles are held against."""
TIES = {
    "mixed": ((0,), (1,), (2,), (3,)),
    "by layer and modality": ((0, 2), (1, 3)),
    "by layer and keys/values": ((0, 1), (2, 3)),
    "by layer": ((0, 1, 2, 3),),
}
"""Which :data:`~kvferry.codecs.mixed.PARTS` of a layer share a width: what each freedom is worth is measured too."""

Pattern = Literal["none", "concentrated", "distributed"]
Losses = npt.NDArray[np.float64]
Done = Callable[[], None]


@dataclass(frozen=True)
class Diagnosis:
    """What the sources' recipe found; ``damage``'s columns are uniform quantization, then every layer alone.

    Parameters
    ----------
    pattern : {"none", "concentrated", "distributed"}
    bits : int
        What was tried.
    bottlenecks : tuple of int
        Layers whose own loss is above :data:`BOTTLENECK_LOSS`.
    plan : tuple of Widths
        What follows.
    damage : Damage
    """

    pattern: Pattern
    bits: int
    bottlenecks: tuple[int, ...]
    plan: Plan
    damage: Damage

    @property
    def words(self) -> str:
        """The pattern in one sentence."""
        layers = ", ".join(map(str, self.bottlenecks))
        loss = f"uniform INT{self.bits} loses {self.damage.losses[0]:.1%} of the full cache's accuracy"
        if self.pattern == "none":
            return f"none: {loss}, at most {MAX_LOSS:.0%}; every layer takes {self.bits} bits"
        if self.pattern == "concentrated":
            return f"concentrated: {loss}; layer {layers} loses over {BOTTLENECK_LOSS:.0%} alone and stays at 16 bits"
        where = f"layers {layers} each lose over {BOTTLENECK_LOSS:.0%} alone" if layers else "no layer stands out"
        return f"distributed: {loss} and {where}; every layer takes {self.plan[0][0]} bits"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        losses, divergence = self.damage.losses, self.damage.divergence.mean(0)
        found = [{"loss": float(a), "divergence": float(b)} for a, b in zip(losses, divergence, strict=True)]
        return {
            "pattern": self.pattern,
            "words": self.words,
            "thresholds": {"loss": MAX_LOSS, "own_loss": BOTTLENECK_LOSS, "bottlenecks": MOST_BOTTLENECKS},
            "tried_bits": self.bits,
            "full_accuracy": float(self.damage.full.mean()),
            "uniform": found[0],
            "layers": found[1:],
        }


@dataclass(frozen=True)
class Allocation:
    """Widths that minimise the summed damage within a budget.

    Parameters
    ----------
    bytes_per_token : float
        The budget: of payload, scales and widths included.
    plans : dict of str to tuple of Widths
        The best for each of :data:`TIES` (``mixed`` is the result), then :data:`UNIFORM`.
    cells : float64 ``[layers, parts, choices]``
        Mean KL in nats where one part of one layer alone takes a width of :data:`CHOICES`.
    measured : Damage
        That of all plans on the same questions.
    """

    bytes_per_token: float
    plans: dict[str, Plan]
    cells: npt.NDArray[np.float64]
    measured: Damage

    @property
    def plan(self) -> Plan:
        """The result."""
        return self.plans["mixed"]

    def predicted(self, plan: Plan) -> float:
        """Summed KL of the plan's cells: what additive damage would give."""
        index = [[CHOICES.index(bits) for bits in widths] for widths in plan]
        return float(np.take_along_axis(self.cells, np.array(index)[..., None], -1).sum())

    @property
    def words(self) -> str:
        """The result in one sentence."""
        took = self.measured.sizes[:, 0].sum() / self.measured.tokens.sum()
        return (
            f"budget: {took:.1f} of {self.bytes_per_token:g} bytes per token; KL {self.predicted(self.plan):.4f} "
            f"predicted from parts alone, {self.measured.divergence[:, 0].mean():.4f} measured together"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        columns = self.measured.divergence.mean(0), self.measured.right.mean(0), self.measured.sizes.sum(0)
        tokens = self.measured.tokens.sum()
        return {
            "pattern": "budget",
            "words": self.words,
            "bytes_per_token": self.bytes_per_token,
            "choices": list(CHOICES),
            "cells": {part: self.cells[:, index].tolist() for index, part in enumerate(PARTS)},
            "full_accuracy": float(self.measured.full.mean()),
            "together": [
                {
                    "widths": name,
                    "predicted": self.predicted(plan),
                    "measured": float(divergence),
                    "accuracy": float(right),
                    "bytes_per_token": float(size / tokens),
                }
                for (name, plan), divergence, right, size in zip(self.plans.items(), *columns, strict=True)
            ],
        }


def diagnose(vlm: VLM, questions: Callable[[], Iterable[Question]], bits: int, done: Done = lambda: None) -> Diagnosis:
    """The sources' recipe: uniform ``bits`` first, then every layer alone; ``done`` is called after every question.

    Raises
    ------
    InputError
        There is no question, or the full cache answers none.
    """
    layers = vlm.layers
    plans = [uniform(layers, bits), *(alone(layers, one, range(len(PARTS)), bits) for one in range(layers))]
    damage = measure(vlm, _watched(questions(), done), plans)
    total, *own = damage.losses.tolist()
    pattern, bottlenecks = decide(total, own)
    return Diagnosis(pattern, bits, bottlenecks, plan_of(pattern, bottlenecks, layers, bits), damage)


def decide(total: float, own: Sequence[float]) -> tuple[Pattern, tuple[int, ...]]:
    """The pattern and the bottleneck layers, from the loss of all layers together and of each alone."""
    bottlenecks = tuple(layer for layer, loss in enumerate(own) if loss > BOTTLENECK_LOSS)
    if total <= MAX_LOSS:
        return "none", bottlenecks
    few = 0 < len(bottlenecks) <= max(1, int(MOST_BOTTLENECKS * len(own)))
    return ("concentrated" if few else "distributed"), bottlenecks


def plan_of(pattern: Pattern, bottlenecks: Sequence[int], layers: int, bits: int) -> Plan:
    """The widths that a pattern asks for."""
    if pattern == "distributed":
        return uniform(layers, 8 if bits < 8 else 16)
    spared = bottlenecks if pattern == "concentrated" else ()
    return tuple((16,) * 4 if layer in spared else (bits,) * 4 for layer in range(layers))


def spend(
    vlm: VLM, questions: Callable[[], Iterable[Question]], bytes_per_token: float, done: Done = lambda: None
) -> Allocation:
    """The best widths within a budget; goes through the questions twice, ``done`` is called after each of them.

    Raises
    ------
    BudgetError
        Not even the narrowest widths fit.
    """
    layers, lossy = vlm.layers, CHOICES[:-1]
    shape = layers, len(PARTS), len(CHOICES)
    cells = [alone(layers, layer, [part], bits) for layer, part in np.ndindex(shape[:2]) for bits in lossy]
    damage = measure(vlm, _watched(questions(), done), cells)
    harm, costs = np.zeros(shape), _costs(damage)
    harm[..., :-1] = damage.divergence.mean(0).reshape(*shape[:2], -1)
    widths = 2 * layers * len(damage.tokens)
    budget = int(bytes_per_token * damage.tokens.sum()) - widths
    if (least := costs.min(-1).sum()) > budget:
        needed = (least + widths) / damage.tokens.sum()
        raise BudgetError(f"INT{CHOICES[0]} everywhere takes {needed:.1f} bytes per token; allow at least that many")
    plans = {name: _best(costs, harm, budget, ties) for name, ties in TIES.items()}
    plans |= {f"int{bits}": uniform(layers, bits) for bits in UNIFORM}
    return Allocation(bytes_per_token, plans, harm, measure(vlm, _watched(questions(), done), list(plans.values())))


def _best(costs: Ints, harm: Losses, budget: int, ties: Sequence[Sequence[int]]) -> Plan:
    """The plan of least summed harm in which tied parts share a width; costs and harm ``[layers, parts, choices]``."""
    layers, _, choices = costs.shape
    tied_costs, tied_harm = (
        np.stack([x[:, list(tie)].sum(1) for tie in ties], axis=1).reshape(-1, choices) for x in (costs, harm)
    )
    chosen = np.array(CHOICES)[allocate(tied_costs, tied_harm, budget)].reshape(layers, -1)
    part = np.argsort(np.concatenate(ties))
    spread = np.repeat(chosen, [len(tie) for tie in ties], axis=1)[:, part]
    return tuple((a, b, c, d) for a, b, c, d in spread.tolist())


def _costs(damage: Damage) -> Ints:
    """Bytes of every part by every choice, over all questions, ``[layers, parts, choices]``."""
    dims = damage.dims.reshape(-1)
    rows = damage.vectors.reshape(len(damage.vectors), -1)
    cells = zip(rows.T, dims, strict=True)
    costs = [[sum(part_size(int(n), int(dim), bits) for n in column) for bits in CHOICES] for column, dim in cells]
    return np.array(costs, np.int64).reshape(*damage.dims.shape, -1)


def bits_of(plan: Plan) -> dict[str, list[int]]:
    """The widths as a profile holds them."""
    return {part: [widths[index] for widths in plan] for index, part in enumerate(PARTS)}


def comparison(recipes: Sequence[str], damage: Damage) -> list[dict[str, Any]]:
    """One row per recipe: accuracy, share of the full cache's, KL and bytes, with 95 % intervals over questions."""
    rows = []
    for index, recipe in enumerate(recipes):
        right, lost = damage.right[:, index], mean_interval(damage.divergence[:, index])
        of_full = ratio_interval(right, damage.full)
        rows.append(
            {
                "recipe": recipe,
                "n": len(right),
                "accuracy": float(right.mean()),
                "of_full": [of_full.mean, of_full.low, of_full.high],
                "divergence": [lost.mean, lost.low, lost.high],
                "bytes": float(damage.sizes[:, index].mean()),
            }
        )
    return rows


def _watched(questions: Iterable[Question], done: Done) -> Iterator[Question]:
    for question in questions:
        yield question
        done()
