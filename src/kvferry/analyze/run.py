"""All measurements over all questions, in one pass and in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np

from kvferry.analyze.energy import Energy, EnergyResult
from kvferry.analyze.harm import Harm, HarmResult
from kvferry.analyze.mass import Mass, MassResult
from kvferry.analyze.observe import DROPS, FRACTIONS, Observation, Subject
from kvferry.analyze.overlap import Overlap, OverlapResult
from kvferry.analyze.rank import KINDS, STATS, Rank, RankResult
from kvferry.analyze.separability import Apart, ApartResult
from kvferry.analyze.source import Questions
from kvferry.analyze.sparsity import Sparsity, SparsityResult
from kvferry.analyze.survivors import Survivors, SurvivorsResult
from kvferry.analyze.tail import Tail, TailResult
from kvferry.analyze.verdicts import Answer, answers
from kvferry.analyze.watch import COLUMNS, ROWS
from kvferry.models.vlm import VLM


@dataclass(frozen=True)
class Prompts:
    """How many prompts were read, and what they hold: means over prompts."""

    n: int
    with_pictures: int
    tokens: float
    visual_tokens: float


@dataclass(frozen=True)
class Analysis:
    """Everything that was measured, and the four answers it gives."""

    model: str
    against: str | None
    source: str
    layers: int
    prompts: Prompts
    rank: RankResult
    energy: EnergyResult
    sparsity: SparsityResult
    mass: MassResult
    tail: TailResult
    apart: ApartResult
    harm: HarmResult
    overlap: OverlapResult
    survivors: SurvivorsResult
    answers: tuple[Answer, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON, with the names of the axes; NaN becomes None, pictures are left out."""
        axes = {
            "modality": list(COLUMNS),
            "row_group": list(ROWS),
            "kind": list(KINDS),
            "stat": list(STATS),
            "fraction": list(FRACTIONS),
            "drop": [f"{share:.0%} of {name} kept" for name, share in DROPS],
            "likeness": ["overlap", "jaccard"],
        }
        plain = {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}
        return {"axes": axes, **plain}


def analyze(
    vlm: VLM,
    questions: Questions,
    against: VLM | None = None,
    *,
    scorers: tuple[str, ...] | None = None,
    on_sample: Callable[[], None] | None = None,
) -> Analysis:
    """Read every question once (once more with the second model) and measure.

    Parameters
    ----------
    against : VLM, optional
        A second model whose kept sets are compared with the first one's.
    scorers : tuple of str, optional
        Whose selections are compared; by default all in :data:`kvferry.selection.SCORERS` that rank tokens.
    on_sample : callable, optional
        Called after every question.

    Raises
    ------
    InputError
        A question or a picture that cannot be used, or a second model that reads prompts as other tokens.
    """
    subject = Subject(vlm, scorers)
    other = None if against is None else Subject(against, scorers)
    count = _Counter()
    rank, sparsity, mass, tail, apart, harm = Rank(), Sparsity(), Mass(), Tail(), Apart(), Harm()
    energy = Energy()
    overlap, survivors = Overlap(subject.scorers), Survivors(subject.scorers)
    for asked in questions.each():
        seen = subject.observe(asked)
        overlap.add(seen, None if other is None else other.choose(asked))
        for measurement in (count, rank, energy, sparsity, mass, tail, apart, harm, survivors):
            measurement.add(seen)
        if on_sample is not None:
            on_sample()
    found = (
        rank.result(), sparsity.result(), mass.result(), tail.result(), apart.result(), harm.result(),
        overlap.result(), survivors.result(),
    )  # fmt: skip
    prompts = count.result()
    return Analysis(
        vlm.name,
        None if against is None else against.name,
        questions.label,
        vlm.layers,
        prompts,
        found[0],
        energy.result(),
        *found[1:],
        answers(prompts.with_pictures, *found),
    )


class _Counter:
    def __init__(self) -> None:
        self._n = self._with_pictures = self._tokens = self._visual = 0

    def add(self, seen: Observation) -> None:
        visual = int(seen.cache.layout.visual.sum())
        self._n += 1
        self._with_pictures += visual > 0
        self._tokens += len(seen.cache.layout)
        self._visual += visual

    def result(self) -> Prompts:
        n = max(1, self._n)
        return Prompts(self._n, self._with_pictures, self._tokens / n, self._visual / n)


def _plain(value: Any) -> Any:
    if isinstance(value, SurvivorsResult):
        drawn = [{"question": x.question, "shares": x.shares} for x in value.drawn]
        return _plain({"scorers": value.scorers, "kept": value.kept, "drawn": drawn})
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value
