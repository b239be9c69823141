"""The recipe of fewest bytes that keeps a share of the full cache's accuracy, found on validation questions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.evaluate import evaluation
from kvferry.evaluate.ceiling import check_answers, check_drawn
from kvferry.evaluate.plan import BARE, FLOOR, Evaluation, planned_task
from kvferry.evaluate.records import Line, Protocol, read
from kvferry.evaluate.results import as_lines
from kvferry.evaluate.sweep import Sweep, run
from kvferry.evaluate.tasks.own import OWN

ROUNDS = (60, 180, 540, 2000)
"""Questions per round: what falls behind early is not asked them all."""
FULL = "full|bf16"
EXACT = "full|bf16|zstd"
MOST = 4
"""Recipes that pass as measured, of which the smallest will be among the winners in the end."""
MILD = 0.995
"""What the preset ``balanced`` keeps of the full cache's accuracy."""
SHARED = tuple(f"leaveout@{f:g},budget=shared" for f in (0.05, 0.08, 0.1, 0.15, 0.25, 0.4))
ALONE = tuple(f"{name}@{f:g}" for name in ("leaveout", "vlcache") for f in (0.05, 0.1, 0.2))
TRANSFORMS = tuple(f"transform:{ratio}" for ratio in (32, 48, 64, 80, 96, 128))
INTEGERS = ("int2|zstd", "int3|zstd", "int4|zstd", "int8|zstd")


def candidates(profile: bool) -> tuple[str, ...]:
    """Recipes that are tried unless others are asked for; the transform codec only where it has a profile."""
    codecs = (*TRANSFORMS, *INTEGERS) if profile else INTEGERS
    pairs = [(s, c) for s in (*SHARED, "full") for c in codecs] + [(s, c) for s in ALONE for c in INTEGERS]
    return (*(f"{s}|{c}" for s, c in pairs), EXACT)


@dataclass(frozen=True)
class Standing:
    """How a recipe does.

    Parameters
    ----------
    share : float
        Of the full cache's right answers.
    margin : float
        ``accuracy - target * full accuracy``.
    error : float
        Its standard error, paired: ``sqrt(d + 1) / n`` where the recipe and the full cache differ on ``d`` answers. The
        one more is there because no difference on 60 questions does not mean none on the next.
    bytes : float
        Mean of whole bitstreams.
    """

    recipe: str
    share: float
    margin: float
    error: float
    bytes: float
    n: int

    @property
    def passes(self) -> bool:
        """Two standard errors above the target.

        The smallest of many that look good is too good to be true: of those that just reached the target on one set of
        questions, the one of fewest bytes owes it to luck.
        """
        return self.margin >= 2 * self.error

    @property
    def sure(self) -> bool:
        """Three standard errors above it: few questions more will not change that."""
        return self.margin >= 3 * self.error

    @property
    def hopeless(self) -> bool:
        """Two standard errors below it."""
        return self.margin < -2 * self.error

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def standings(lines: Sequence[Line], target: float) -> list[Standing]:
    """Of every recipe but the full cache, by bytes. What an oracle scored does not stand: no deployment can do it."""
    correct = {name: _column(lines, name, 0) for name in lines[0].outcomes if not name.endswith(" oracle")}
    full = correct.pop(FULL)
    if not full.any():
        raise InputError("the full cache answers nothing right; there is no accuracy to keep (look at the data)")
    found = []
    for name, mine in correct.items():
        difference = mine - target * full
        error = float((np.abs(mine - full).sum() + 1) ** 0.5 / len(lines))
        size = float(_column(lines, name, 1).mean())
        share = float(mine.mean() / full.mean())
        found.append(Standing(name, share, float(difference.mean()), error, size, len(lines)))
    return sorted(found, key=lambda x: x.bytes)


def _column(lines: Sequence[Line], name: str, which: int) -> npt.NDArray[np.float64]:
    return np.array([line.outcomes[name][which] for line in lines], np.float64)


def still_in(found: Sequence[Standing]) -> list[Standing]:
    """Those that may yet be the smallest that passes.

    Not hopeless, no larger than one that surely passes, and no larger than the :data:`MOST` smallest that pass as
    measured.
    """
    passing = sorted(x.bytes for x in found if x.passes)[:MOST]
    largest = min([x.bytes for x in found if x.sure] + passing[MOST - 1 :], default=float("inf"))
    return [x for x in found if not x.hopeless and x.bytes <= largest]


def questions_needed(lines: Sequence[Line], target: float) -> int | None:
    """How many show that a recipe keeps the target, if it answers as the full cache does; None if no number does."""
    room = (1 - target) * float(_column(lines, FULL, 0).mean())
    return math.ceil(2 / room) if room > 0 else None


def goals(target: float) -> dict[str, float]:
    """Of the full cache's accuracy, what each preset that is searched for has to keep."""
    return {"tiny": target, "balanced": max(target, MILD)}


def presets(lines: Sequence[Line], target: float) -> dict[str, str]:
    """``tiny``: the fewest bytes at the target; ``balanced``: at :data:`MILD`; ``lossless``: every bit.

    A name is left out where no recipe passes.
    """
    best = {
        name: next((x.recipe.split(" ")[0] for x in standings(lines, goal) if x.passes), None)
        for name, goal in goals(target).items()
    }
    return {name: recipe for name, recipe in best.items() if recipe} | {"lossless": EXACT}


@dataclass(frozen=True)
class Tuning:
    """What to search.

    Parameters
    ----------
    target : float
        Share of the full cache's accuracy.
    split : str
        Never the one that results are reported on.
    folder : Path
        Raw results of each round, so that an interrupted search goes on where it stopped.
    device, dtype : str
        Of the model; see :func:`kvferry.load`. Empty for the CPU.
    data, images, metric, instruction, max_new_tokens
        Questions of one's own instead of the split's, as in :class:`kvferry.evaluate.plan.Evaluation`.
    """

    model: str
    recipes: tuple[str, ...]
    folder: Path
    protocol: Protocol = "A"
    target: float = 0.98
    split: str = "validation"
    rounds: tuple[int, ...] = ROUNDS
    device: str = ""
    dtype: str = "auto"
    data: str = ""
    images: str = ""
    metric: str = ""
    instruction: str = ""
    max_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.split == "test":
            raise InputError("a recipe that is chosen on the test split cannot be reported on it; use validation")
        if not 0 < self.target <= 1:
            raise InputError(f"the target is a share in (0, 1], not {self.target:g}")

    def search(self, processes: int) -> Iterator[list[Line]]:
        """The answers of every round; of the last one's, the smallest recipe that passes has won.

        Raises
        ------
        InputError
            The full cache answers nothing rightly.
        """
        alive = tuple(r for r in self.recipes if r != FULL)
        for number, n in enumerate(self.rounds, start=1):
            lines, whole = (self._own if self.data else self._drawn)(number, n, alive, processes)
            yield lines
            hopeful = [x for goal in goals(self.target).values() for x in still_in(standings(lines, goal))]
            alive = tuple(dict.fromkeys(x.recipe.split(" ")[0] for x in hopeful))
            if len(alive) < 2 or whole:
                return

    def _drawn(self, number: int, n: int, alive: Sequence[str], processes: int) -> tuple[list[Line], bool]:
        """The answers, and whether no more can be asked."""
        plan = Sweep(
            self.model,
            (FULL, *alive),
            (self.protocol,),
            self.split,
            n,
            check="forced",
            device=self.device,
            dtype=self.dtype,
        )
        out = self._file(number, plan.recipes)
        for _ in run(plan, out, processes):
            pass
        lines = read(out)[1]
        check_drawn(plan, lines, self.protocol)
        return lines, False

    def _own(self, number: int, n: int, alive: Sequence[str], processes: int) -> tuple[list[Line], bool]:
        """Ceiling and floor come with the recipes; the floor does not stand for election."""
        plan = Evaluation(
            self.model,
            OWN,
            tuple(alive),
            (self.protocol,),
            self.data,
            n=n,
            device=self.device,
            dtype=self.dtype,
            images=self.images,
            metric=self.metric,
            instruction=self.instruction,
            max_new_tokens=self.max_new_tokens,
        )
        out = self._file(number, plan.recipes)
        for _ in evaluation.run(plan, out, processes):
            pass
        task, asked = planned_task(vars(plan)), evaluation.read(out)[1]
        check_answers(task, asked, self.protocol)
        lines = as_lines(task, asked)
        floors = {FLOOR, BARE} - set(alive)
        elected = [replace(x, outcomes={k: v for k, v in x.outcomes.items() if k not in floors}) for x in lines]
        return elected, plan.n < n

    def _file(self, number: int, recipes: Sequence[str]) -> Path:
        asked = crc32("\n".join([*recipes, *([repr(self._question)] if self.data else [])]).encode())
        return self.folder / f"round-{number}-{asked:08x}.jsonl"

    @property
    def _question(self) -> tuple[object, ...]:
        return self.data, self.images, self.metric, self.instruction, self.max_new_tokens
