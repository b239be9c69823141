"""Ways of selecting tokens as a results file holds them: grouped, told apart by what they read, and compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kvferry.evaluate.answers import Answers, Floats
from kvferry.evaluate.records import Line, Protocol
from kvferry.recipe import Recipe
from kvferry.selection.budgets import Uniform as UniformBudget
from kvferry.selection.leaveout import LeaveOut
from kvferry.selection.modality import Uniform as UniformPolicy
from study.bytes_needed import needed_by_draw

SHARES = (0.98, 0.95)
"""Shares of the full cache's accuracy for which the bytes needed are asked."""
AWARE_ROWS = ("post_vision", "visual")
"""Rows of attention that are found by where the visual tokens stand."""

_FRACTION = re.compile(r"@([0-9.]+)")


@dataclass(frozen=True)
class Method:
    """One way of selecting under one protocol: its points by falling fraction.

    Parameters
    ----------
    base : str
        The recipe's selection without its fraction.
    label : {"", "proxy", "oracle"}
        How it was scored, see :data:`kvferry.evaluate.sweep.NEEDS_QUESTION`.
    fractions, rows : tuple
        The measured points and the names of their rows.
    """

    base: str
    label: str
    fractions: tuple[float, ...]
    rows: tuple[str, ...]

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.base} ({self.label})" if self.label else self.base

    @property
    def deployable(self) -> bool:
        """Whether it knows only what an edge device knows."""
        return self.label != "oracle"

    @cached_property
    def recipe(self) -> Recipe:
        """Of its first point."""
        return Recipe.parse(self.rows[0].split(" ")[0])

    @property
    def aware(self) -> bool:
        """Whether what stays depends on which tokens are visual.

        Decided by what a method reads, not by what its authors call it: attention of rows that are found by where the
        pictures stand (``vlcache``; every ``budget=sparsity``), or a modality policy. ``q2c`` reads the question,
        ``snapkv`` and ``leaveout`` the end of the prompt, whatever stands before it: they are task-aware, but a prompt
        of text alone would be treated alike, so they count as modality-agnostic.
        """
        reads = any(request.rows in AWARE_ROWS for request in self.recipe.requests)
        return reads or not isinstance(self.recipe.modality, UniformPolicy)

    @property
    def published(self) -> bool:
        """Whether the scorer is somebody else's, and not one of kvferry's own."""
        return not isinstance(self.recipe.selection, LeaveOut)

    @cached_property
    def plain(self) -> str:
        """The base of the same scorer without a budget or policy of its own."""
        plain = replace(self.recipe, budget=UniformBudget(), modality=UniformPolicy())
        return _FRACTION.sub("", str(plain).split("|")[0], count=1)


def methods_of(rows: Iterable[str]) -> list[Method]:
    """Row names grouped into methods: the recipe without its fraction and codec, and how it was scored."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for row in rows:
        recipe, _, label = row.partition(" ")
        selection = recipe.split("|")[0]
        fraction = _FRACTION.search(selection)
        if fraction is not None:
            found.setdefault((_FRACTION.sub("", selection, count=1), label), []).append((float(fraction[1]), row))
    methods = []
    for base, label in sorted(found):
        points = sorted(found[base, label], reverse=True)
        methods.append(Method(base, label, tuple(f for f, _ in points), tuple(r for _, r in points)))
    return methods


class Methods(Answers):
    """Answers grouped by method, and the bytes that each method needs."""

    def __init__(self, lines: Sequence[Line], protocol: Protocol) -> None:
        super().__init__(lines, protocol)
        self.methods = methods_of(self.names)
        self._needed: dict[tuple[str, float], Floats] = {}

    def needed(self, method: Method, share: float) -> Floats:
        """Bytes that a method needs for a share of full accuracy: measured, then of every draw of questions."""
        key = (method.name, share)
        if key not in self._needed:
            rows = [*method.rows, self.full]
            means = self._means[[self._row[row] for row in rows]]
            self._needed[key] = needed_by_draw([self.bytes[row] for row in rows], means, share)
        return self._needed[key]

    def best(self, aware: bool, share: float, *, published: bool = False) -> tuple[Method, Floats] | None:
        """Of the deployable (and published) methods of one sort the one that needs least; None where there is none.

        The draws are those of the sort, not of that method: the best one is chosen anew in each of them, so that an
        interval holds what choosing among many on the same questions is worth.
        """
        sort = [m for m in self.methods if m.aware == aware and m.deployable and m.published >= published]
        if not sort:
            return None
        draws = np.stack([self.needed(m, share) for m in sort])
        return sort[int(draws[:, 0].argmin())], draws.min(axis=0)

    def ranked(self, aware: bool | None = None) -> list[Method]:
        """Methods by the bytes they need for the last of :data:`SHARES`, of one sort or all."""
        sort = [m for m in self.methods if aware is None or m.aware == aware]
        return sorted(sort, key=lambda m: (float(self.needed(m, SHARES[-1])[0]), m.name))

    def strongest(self, each: int = 3) -> list[Method]:
        """The methods worth seeing: of both sorts the ``each`` deployable ones that need least, each base once."""
        chosen: list[Method] = []
        for aware in (True, False):
            mine: dict[str, Method] = {}
            for method in self.ranked(aware):
                if method.deployable:
                    mine.setdefault(method.base, method)
            chosen += list(mine.values())[:each]
        return chosen

    def plain_of(self, method: Method) -> Method | None:
        """The same scorer without a budget or policy of its own, scored alike if it was, else without a question."""
        if method.plain == method.base:
            return None
        plain = {m.label: m for m in self.methods if m.base == method.plain}
        return plain.get(method.label) or plain.get("")
