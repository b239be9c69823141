"""Mode scout on trial: two models read the same questions, and the large one answers from what either would keep.

The sets, the message and the eviction are mode scout's own (:mod:`kvferry.modes.scout`); only the wire between the
two halves is left out, and both models see the picture as it is. Protocol A: the question is known before anything is
chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvferry.bitstream.sets import decode_set, encode_set, set_forms
from kvferry.errors import InputError
from kvferry.evaluate.forced import forced_logits, says
from kvferry.evaluate.records import json_lines
from kvferry.evaluate.sweep import provenance
from kvferry.modes.ranking import checked_ranking, kept_visual, selection_of
from kvferry.modes.scout import sealed
from kvferry.recipe import Recipe
from kvferry.selection import evict
from kvferry.selection.random import Random
from study.raw import held

if TYPE_CHECKING:
    from kvferry.evidence import EvidenceRequest, Prefilled
    from kvferry.models import VLM
    from kvferry.testbed import Sample

SCORERS = ("q2c", "snapkv", "vlcache", "leaveout")
FRACTIONS = (0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Trial:
    """What to run.

    Parameters
    ----------
    edge, cloud : str
        Anything ``kvferry.load`` takes; both must split words and pictures alike.
    scorers : tuple of str
    fractions : tuple of float
        Of the visual tokens; all text stays.
    split : str
        Of the testbed's questions.
    n, start : int
        Which questions.
    kinds : tuple of str
        Which kinds of question take turns; empty for all of them.
    """

    edge: str
    cloud: str
    scorers: tuple[str, ...] = SCORERS
    fractions: tuple[float, ...] = FRACTIONS
    split: str = "test"
    n: int = 1000
    start: int = 0
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1 or not self.scorers or not self.fractions:
            raise InputError("a trial needs at least one question (--n), one scorer and one fraction")
        for ranking in self.rankings:
            checked_ranking(Recipe.parse(ranking), "mode scout")

    @property
    def rankings(self) -> tuple[str, ...]:
        """Every scorer at every fraction, as mode scout's options: ``vlcache@0.25``."""
        return tuple(f"{scorer}@{fraction:g}" for scorer in self.scorers for fraction in self.fractions)

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """What prefill observes for all of them."""
        return tuple(dict.fromkeys(x for ranking in self.rankings for x in Recipe.parse(ranking).requests))


class Found(NamedTuple):
    """One ranking on one question: tokens that both models keep, right answers, and bytes.

    ``own`` and ``edge`` say whether the cloud answers rightly from its own choice and from the edge's; ``sent`` are the
    bytes of the positions with message and checksum, ``runs`` and ``coded`` those of two of the forms alone. The
    bitmap takes a bit per token.
    """

    both: int
    own: int
    edge: int
    sent: int
    runs: int
    coded: int


@dataclass(frozen=True)
class ScoutLine:
    """One question. What is 0 or 1 says whether the answer is right.

    Parameters
    ----------
    visual : int
        Visual tokens.
    bf16_bytes, image_bytes : int
        The cloud's full cache, and the pictures as JPEG of quality 90.
    full, none, alone : int
        The cloud on its full cache and without a visual token, and the edge's model by itself.
    random : list of int
        The cloud on as many tokens as each fraction says, drawn at random.
    found : list of Found
        For each of :attr:`Trial.rankings`.
    length : int
        Prompt tokens that the cloud's full cache holds.
    """

    index: int
    kind: str
    visual: int
    bf16_bytes: int
    image_bytes: int
    full: int
    none: int
    alone: int
    random: list[int]
    found: list[Found]
    length: int = 0


def try_question(edge: VLM, cloud: VLM, sample: Sample, trial: Trial) -> ScoutLine:
    """Both prefills, then every ranking."""
    from kvferry.overlay import jpeg_bytes

    here = edge.prefill(sample.images, sample.question, requests=trial.requests)
    there = cloud.prefill(sample.images, sample.question, requests=trial.requests)
    grids, visual = there.cache.layout.grids, int(there.cache.layout.visual.sum())
    masks = {"none": np.zeros(visual, np.bool_)}
    masks |= {f"random@{share:g}": kept_visual(there, Recipe(Random(), share)) for share in trial.fractions}
    numbers = {}
    for ranking in trial.rankings:
        mine, theirs = (kept_visual(x, Recipe.parse(ranking)) for x in (there, here))
        message = encode_set(theirs, here.cache.layout.grids)
        forms = set_forms(theirs, here.cache.layout.grids)
        arrived = decode_set(message, visual, grids)
        masks |= {f"{ranking} own": mine, f"{ranking} edge": arrived}
        sent = len(sealed(message, visual))
        numbers[ranking] = int((mine & arrived).sum()), sent, len(forms["runs"]), len(forms["coded"])
    caches = {row: evict(there.cache, selection_of(there, mask)) for row, mask in masks.items()}
    logits = forced_logits(cloud, {"full": there.cache, **caches}, sample.answer)
    right = {row: int(says(cloud, x, sample.answer)) for row, x in logits.items()}
    return ScoutLine(
        index=sample.index,
        kind=sample.kind,
        visual=visual,
        bf16_bytes=there.cache.full_bf16_bytes,
        image_bytes=sum(len(jpeg_bytes(image)) for image in sample.images),
        full=right["full"],
        none=right["none"],
        alone=_alone(edge, here, sample.answer),
        random=[right[f"random@{share:g}"] for share in trial.fractions],
        found=[Found(x[0], right[f"{row} own"], right[f"{row} edge"], *x[1:]) for row, x in numbers.items()],
        length=there.cache.length,
    )


def _alone(edge: VLM, prefilled: Prefilled, answer: str) -> int:
    return int(says(edge, forced_logits(edge, {"full": prefilled.cache}, answer)["full"], answer))


def run(trial: Trial, out: Path, command: str = "") -> Iterator[ScoutLine]:
    """Try what ``out`` does not hold yet, append it line by line, yield each line as it comes.

    Raises
    ------
    InputError
        ``out`` holds another trial, or the two models' prompts differ.
    """
    from kvferry.models import load
    from kvferry.testbed import samples

    edge, cloud = load(trial.edge), load(trial.cloud)
    if edge.prompt_fingerprint != cloud.prompt_fingerprint:
        raise InputError(
            f"{trial.edge} and {trial.cloud} split words or pictures differently, so that positions of one name other "
            "tokens in the other; take models of one family"
        )
    plan = json.loads(json.dumps(asdict(trial)))
    head = {"scout": plan, "command": command, **provenance(cloud), "edge_fingerprint": edge.fingerprint}
    fixed, models = set(plan) - {"n", "start"}, ("fingerprint", "edge_fingerprint")

    def same(before: dict[str, Any]) -> bool:
        alike = all(before["scout"][key] == plan[key] for key in fixed)
        return alike and all(before[key] == head[key] for key in models)

    done = held(out, head, _indices, same)
    with out.open("a") as file:
        for index in range(trial.start, trial.start + trial.n):
            if index in done:
                continue
            (sample,) = samples(trial.split, 1, start=index, kinds=trial.kinds or None)
            line = try_question(edge, cloud, sample, trial)
            file.write(json.dumps(list(asdict(line).values()), separators=(",", ":")) + "\n")
            file.flush()
            yield line


def _take_off_the_last_token(records: list[dict[str, Any]]) -> None:
    """Correct lines of before ``length`` was written: they took the whole prompt for the size of the full cache, which
    holds one token less, since the last one is fed again. A token's bytes are the greatest that divide all sizes, which
    some questions alone do not tell.
    """
    token = math.gcd(*(record["bf16_bytes"] for record in records))
    if any(record["bf16_bytes"] <= token * record["visual"] for record in records):
        return
    for record in records:
        record["length"] = record["bf16_bytes"] // token - 1
        record["bf16_bytes"] = token * record["length"]


def _indices(path: Path) -> tuple[dict[str, Any], Iterator[int]]:
    head, lines = read(path)
    return head, (line.index for line in lines)


def read(path: Path) -> tuple[dict[str, Any], list[ScoutLine]]:
    """Provenance and questions of a file by :func:`run`, by index; a half-written last line is dropped."""
    if not path.is_file():
        raise InputError(f"no results at {path}; `python -m study scout-overlap --out {path}` makes them")
    head, *rest = json_lines(path) or [{}]
    if not (isinstance(head, dict) and "scout" in head):
        raise InputError(f"{path} is not a results file of `python -m study scout-overlap`")
    names = [field.name for field in fields(ScoutLine)]
    records: list[dict[str, Any]] = [dict(zip(names, values, strict=False)) for values in rest]
    _take_off_the_last_token([record for record in records if "length" not in record])
    lines = [ScoutLine(**{**record, "found": [Found(*x) for x in record["found"]]}) for record in records]
    return head, sorted(lines, key=lambda line: line.index)
