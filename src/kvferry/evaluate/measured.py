"""Rows of a results file as codecs' points: read, grouped into families, and compared on the same questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kvferry.codecs import BF16, SVD, AnyCodec, Delta, Integer, Transform, codec_text
from kvferry.evaluate.answers import Answers
from kvferry.evaluate.plan import BARE
from kvferry.evaluate.records import Line, Outcome, Protocol
from kvferry.evaluate.tables import PICTURES as PICTURE_ROWS
from kvferry.recipe import Recipe
from kvferry.statistics import FEWEST, TOO_FEW, Estimate, estimate_of, holm, means_with_draws, paired_p, wilcoxon

KEPT = 0.98
"""The share of the full cache's accuracy that a row has to reach to count as good."""
SAME = "no difference shown"
MODES = {"image": "JPEG", "embeds": "embeds"}
"""What is sent instead of a cache, by how its rows' names begin, and the name of its family."""
PICTURES = MODES["image"]

_FRACTION = re.compile(r"@[0-9.]+")
_RATES = (
    (re.compile(r"^int\d"), "intB"),
    (re.compile(r"^(kivi|turbo):[\d.]+"), r"\1:B"),
    (re.compile(r"^(svd|transform):[\d.]+"), r"\1:R"),
    (re.compile(r"^(delta:\d+).*"), r"\1"),
    (re.compile(r"^(mixed|apart).*"), r"\1"),
)
"""What of a codec's text says how many bits it takes, and what stands for it in the name of a family."""


@dataclass(frozen=True)
class Point:
    """One row name, read: a recipe (perhaps with ``proxy`` or ``oracle``), or ``image:Q`` or ``embeds:CODEC``."""

    name: str

    @property
    def mode(self) -> str | None:
        """Of :data:`MODES`, or the bare question, where no cache is sent."""
        mode = self.name.partition(":")[0]
        return mode if mode in MODES or mode == BARE else None

    @property
    def quality(self) -> int | None:
        """Of a JPEG."""
        return int(self.name.partition(":")[2]) if self.family == PICTURES else None

    @cached_property
    def recipe(self) -> Recipe | None:
        """None where no cache is sent."""
        return None if self.mode else Recipe.parse(self.name.partition(" ")[0])

    @property
    def codec(self) -> AnyCodec | None:
        """Of the cache."""
        return None if self.recipe is None else self.recipe.codec

    @property
    def bits(self) -> int | None:
        """Of uniform integers."""
        return self.codec.bits if isinstance(self.codec, Integer) else None

    @property
    def rank(self) -> int | None:
        """Of a decomposition cut there, its factors in the usual bits."""
        return self.codec.rank if isinstance(self.codec, SVD) and self.codec == SVD(self.codec.rank) else None

    @property
    def selection(self) -> str:
        """Its text, the fraction with it; empty where no cache is sent."""
        return self.name.partition("|")[0] if self.recipe else ""

    @property
    def base(self) -> str:
        """Selection without its fraction."""
        return _FRACTION.sub("", self.selection, count=1)

    @property
    def whole(self) -> bool:
        """Whether every token is kept."""
        return self.selection == "full"

    @property
    def deployable(self) -> bool:
        """Whether it knows only what an edge device knows."""
        return not self.name.endswith(" oracle")

    @property
    def stage(self) -> str:
        """How its numbers become bytes: ``packed``, ``zstd``, or ``range`` where a model of them is learnt on the way.

        Codecs that always code by a model count as ``range``, so that they are held against integers coded so too.
        """
        if self.recipe is None:
            return ""
        codec = self.recipe.codec
        if isinstance(codec, Delta | Transform) or (isinstance(codec, Integer) and codec.coder == "range"):
            return "range"
        return self.recipe.lossless or "packed"

    @cached_property
    def family(self) -> str:
        """All rows that differ from it only in how many tokens or bits they spend."""
        if self.recipe is None:
            return MODES.get(self.mode or "", BARE)
        codec = codec_text(self.recipe.codec)
        for pattern, rate in _RATES:
            codec = pattern.sub(rate, codec)
        label = self.name.partition(" ")[2]
        text = "|".join([self.base, codec, *filter(None, [self.recipe.lossless])])
        return f"{text} {label}".strip()


@dataclass(frozen=True)
class Comparison:
    """Of a row's answers with another's to the same questions.

    Parameters
    ----------
    difference : Estimate
        Of accuracy.
    p : float
        Two-sided, see :func:`kvferry.statistics.paired_p`.
    """

    difference: Estimate
    p: float

    @property
    def words(self) -> str:
        """What the interval shows."""
        if self.difference.n < FEWEST:
            return TOO_FEW
        if self.difference.low <= 0 <= self.difference.high:
            return SAME
        return "more right" if self.difference.mean > 0 else "fewer right"


def corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, their p adjusted for how many they are (Holm)."""
    return [replace(x, p=p) for x, p in zip(found, holm([x.p for x in found]), strict=True)]


class Measured(Answers):
    """Answers, bytes and divergences of every row of one protocol, with the draws of questions that intervals need.

    Pictures and their embeddings are only sent under protocol A, where they are what they would be under B: their rows
    are taken from there for the same questions.
    """

    def __init__(self, lines: Sequence[Line], protocol: Protocol) -> None:
        super().__init__(_with_pictures(lines, protocol), protocol)
        self.points = {name: Point(name) for name in self.names}
        sizes = np.array([[x.outcomes[n][1] for x in self.lines] for n in self.names], np.float64)
        self._sizes = means_with_draws(sizes, groups=self.groups)
        self._bf16 = means_with_draws(np.array([[x.bf16_bytes for x in self.lines]], np.float64), groups=self.groups)[0]
        outcomes = [[Outcome(*x.outcomes[n]) for x in self.lines] for n in self.names]
        self._each_kl, moved = (
            np.array([[x[column] for x in row] for row in outcomes], np.float64) for column in (2, 3)
        )
        self._kl, self._moved = (means_with_draws(x, groups=self.groups) for x in (self._each_kl, moved))

    def of_full(self, row: str) -> Estimate:
        """Right answers as a share of the full cache's."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.estimate(self._means[self._row[row]] / self._means[self._row[self.full]])

    def good(self, row: str) -> bool:
        """Whether it reaches :data:`KEPT`, as measured."""
        return self.of_full(row).mean >= KEPT - 1e-9

    def compare(self, row: str, other: str) -> Comparison:
        """Paired, ``row`` minus ``other``."""
        one, two = self._row[row], self._row[other]
        difference = estimate_of(self._means[one] - self._means[two], self.n)
        return Comparison(difference, paired_p(self.correct[one], self.correct[two]))

    def size(self, row: str) -> Estimate:
        """Mean bytes of a question."""
        return self.estimate(self._sizes[self._row[row]])

    def shrink(self, row: str) -> Estimate:
        """How many times fewer bytes than the full cache in BF16."""
        return self.estimate(self._bf16 / self._sizes[self._row[row]])

    def size_ratio(self, row: str, other: str) -> Estimate:
        """Bytes of ``row`` by those of ``other``."""
        return self.estimate(self._sizes[self._row[row]] / self._sizes[self._row[other]])

    def kl(self, row: str) -> Estimate | None:
        """Nats a token from the full cache; None where it was not measured."""
        draws = self._kl[self._row[row]]
        return None if np.isnan(draws).any() else self.estimate(draws)

    def moved(self, row: str) -> Estimate | None:
        """Relative error of the attention's outputs; None where it was not measured."""
        draws = self._moved[self._row[row]]
        return None if np.isnan(draws).any() else self.estimate(draws)

    def kl_ratio(self, row: str, other: str) -> Estimate | None:
        """KL of ``row`` by that of ``other``; None where there is nothing to divide by."""
        one, two = self._kl[self._row[row]], self._kl[self._row[other]]
        if np.isnan(one).any() or not (two > 0).all():
            return None
        return self.estimate(one / two)

    def kl_p(self, row: str, other: str) -> float | None:
        """p of the signed-rank test of both rows' KL, question by question; None where one was not measured."""
        one, two = self._each_kl[self._row[row]], self._each_kl[self._row[other]]
        return None if np.isnan(one + two).any() else wilcoxon(one, two)

    def families(self) -> dict[str, list[Point]]:
        """Rows by family, by falling bytes; neither the uncompressed ceiling nor the floor is one."""
        found: dict[str, list[Point]] = {}
        for point in self.points.values():
            plain = point.whole and isinstance(point.codec, BF16) and point.stage == "packed"
            if point.base != "none" and point.name != BARE and not plain:
                found.setdefault(point.family, []).append(point)
        return {family: self.by_size(points) for family, points in found.items()}

    def leaders(self, most: int = 5) -> list[str]:
        """Families of caches that reach :data:`KEPT` in the fewest bytes."""
        families = {f: points for f, points in self.families().items() if f not in MODES.values()}
        best = {family: self.smallest_good(points) for family, points in families.items()}
        sizes = {family: self.bytes[point.name] for family, point in best.items() if point is not None}
        return sorted(sizes, key=lambda family: (sizes[family], family))[:most]

    def by_size(self, points: Sequence[Point]) -> list[Point]:
        """Largest first."""
        return sorted(points, key=lambda point: (-self.bytes[point.name], point.name))

    def smallest_good(self, points: Sequence[Point]) -> Point | None:
        """The fewest bytes at which :data:`KEPT` is reached; measured rows only, nothing between them."""
        return next((p for p in reversed(self.by_size(points)) if self.good(p.name)), None)

    def nearest(self, row: str, among: Sequence[Point]) -> Point | None:
        """The one of ``among`` whose bytes are nearest, as a ratio."""
        own = np.log(self.bytes[row])
        return min(among, key=lambda p: (abs(np.log(self.bytes[p.name]) - own), p.name), default=None)


def _with_pictures(lines: Sequence[Line], protocol: Protocol) -> list[Line]:
    """The protocol's lines, each with the rows of :data:`MODES` of protocol A, whose KL is to another full cache."""
    if protocol == "A":
        return [x for x in lines if x.protocol == "A"]
    pictures = {
        x.index: {k: Outcome(o[0], o[1]) for k, o in x.outcomes.items() if k.startswith(PICTURE_ROWS)}
        for x in lines
        if x.protocol == "A"
    }
    mine = [x for x in lines if x.protocol == protocol]
    if not any(pictures.values()):
        return mine
    return [replace(x, outcomes={**x.outcomes, **pictures[x.index]}) for x in mine if x.index in pictures]
