"""Mode translate on trial: the large model answers from the small one's cache, translated, at several sizes.

Streams, translation and reading are the mode's own (:mod:`kvferry.modes.translate`); only the wire between its two
halves is left out. Protocol A: the small model knows the question when it selects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.errors import InputError
from kvferry.evaluate.forced import forced_logits, says
from kvferry.evaluate.records import json_lines
from kvferry.evaluate.sweep import provenance
from kvferry.modes.translate import visual_part
from kvferry.presets import recipe_text
from kvferry.recipe import Recipe, compress, decompress, write_frames
from kvferry.translator import Translator, rows_of
from study.raw import held

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM
    from kvferry.testbed import Sample

TINY = "leaveout@0.4,budget=shared|transform:80"
"""The edge's ``tiny`` preset, see testbed/edge/presets.json; a test holds it against that file."""
RECIPES = ("full|bf16", "full|transform:16", "full|transform:32", TINY)
ALONE, SMALL, NOTHING = "edge", "edge tiny", "nothing"
"""Rows beside the recipes: the edge's own answer from its full cache and from its tiny preset (whole stream), and the
cloud's from the words alone."""
ERRORS_EVERY = 10
"""For one of so many questions the cloud reads the picture too, so that the translation's error is known."""


@dataclass(frozen=True)
class Trial:
    """What to run; ``translator`` is the digest of the file."""

    edge: str
    cloud: str
    translator: str
    recipes: tuple[str, ...] = RECIPES
    split: str = "test"
    n: int = 1000
    start: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError("a trial needs at least one question (--n)")
        for text in self.recipes:
            Recipe.parse(text)


@dataclass(frozen=True)
class TranslateLine:
    """One question.

    Parameters
    ----------
    bf16_bytes : int
        The edge's full cache.
    rows : dict of str to (int, int)
        Right (1) or wrong, and bytes, for every row.
    errors : list of [float, float], per cloud layer
        Keys' and values' squared error, as a share of their squared distance from the mean; empty where the cloud did
        not read the picture.
    """

    index: int
    kind: str
    bf16_bytes: int
    rows: dict[str, tuple[int, int]]
    errors: list[list[float]]


def try_question(edge: VLM, cloud: VLM, translator: Translator, sample: Sample, trial: Trial) -> TranslateLine:
    """One small prefill, then every recipe."""
    recipes = {text: Recipe.parse(text) for text in trial.recipes}
    tiny = Recipe.parse(recipe_text(TINY))
    requests = tuple(dict.fromkeys(x for recipe in (*recipes.values(), tiny) for x in recipe.requests))
    here = edge.prefill(sample.images, sample.question, requests=requests)
    stream = compress(here, tiny)
    alone = forced_logits(edge, {ALONE: here.cache, SMALL: decompress(stream)}, sample.answer)
    rows = {row: (int(says(edge, x, sample.answer)), 0) for row, x in alone.items()}
    rows[SMALL] = rows[SMALL][0], len(stream)
    caches, sizes = {}, {}
    for text, recipe in recipes.items():
        kept, importance = visual_part(*recipe.rank(here))
        blob = b"".join(write_frames(kept, recipe, importance))
        caches[text], sizes[text] = translated(cloud, translator, decompress(blob)), len(blob)
    none = visual_part(Recipe.parse("none|bf16").keep(here))[0]
    caches[NOTHING], sizes[NOTHING] = translated(cloud, translator, none), 0
    logits = forced_logits(cloud, caches, sample.answer)
    rows |= {row: (int(says(cloud, x, sample.answer)), sizes[row]) for row, x in logits.items()}
    errors = []
    if sample.index % ERRORS_EVERY == 0:
        there = cloud.prefill(sample.images, sample.question).cache
        errors = layer_errors(cloud, translator, visual_part(here.cache)[0], visual_part(there)[0])
    return TranslateLine(sample.index, sample.kind, here.cache.full_bf16_bytes, rows, errors)


def translated(cloud: VLM, translator: Translator, arrived: KVCache) -> KVCache:
    """What the cloud answers from."""
    from kvferry.models.steps import Pace, finished
    from kvferry.models.translated import read_on

    index = arrived.layers[0].positions[0]
    pairs = translator(arrived.layers, arrived.layout, cloud.rotary, index)
    return finished(read_on(cloud, arrived.layout, arrived.length, pairs, index, Pace()))


def layer_errors(cloud: VLM, translator: Translator, small: KVCache, large: KVCache) -> list[list[float]]:
    """See :attr:`TranslateLine.errors`."""
    where = torch.from_numpy(small.layout.positions[:, small.layers[0].positions[0].numpy()].astype(np.int64))
    found = translator.rows(rows_of(small.layers, translator.rotary, where))
    wanted = rows_of(large.layers, cloud.rotary, where)
    sizes = [heads * dim for heads, dim in translator.target_shapes for _ in range(2)]
    off = (wanted - translator.tensors["mean_out"]).square().sum(0)
    wrong = (found - wanted).square().sum(0)
    shares = [float(a.sum() / b.sum()) for a, b in zip(torch.split(wrong, sizes), torch.split(off, sizes), strict=True)]
    return [[round(x, 4) for x in shares[i : i + 2]] for i in range(0, len(shares), 2)]


def run(
    trial: Trial, edge: VLM, cloud: VLM, translator: Translator, out: Path, command: str = ""
) -> Iterator[TranslateLine]:
    """Try what ``out`` does not hold yet, append it line by line, yield each line as it comes.

    Raises
    ------
    InputError
        ``out`` holds another trial.
    """
    from kvferry.testbed import samples

    plan = json.loads(json.dumps(asdict(trial)))
    facts = {key: translator.facts.get(key) for key in ("n", "data", "hidden", "losses", "command")}
    head = {"translate": plan, "command": command, **provenance(cloud), "edge_fingerprint": edge.fingerprint}
    head |= {"translator": facts | {"multiplications": translator.multiplications}}
    fixed, models = set(plan) - {"n", "start"}, ("fingerprint", "edge_fingerprint")

    def same(before: dict[str, Any]) -> bool:
        alike = all(before["translate"][key] == plan[key] for key in fixed)
        return alike and all(before[key] == head[key] for key in models)

    done = held(out, head, _indices, same)
    with out.open("a") as file:
        for index in range(trial.start, trial.start + trial.n):
            if index in done:
                continue
            (sample,) = samples(trial.split, 1, start=index)
            line = try_question(edge, cloud, translator, sample, trial)
            file.write(json.dumps(asdict(line), separators=(",", ":")) + "\n")
            file.flush()
            yield line


def _indices(path: Path) -> tuple[dict[str, Any], Iterator[int]]:
    head, lines = read(path)
    return head, (line.index for line in lines)


def read(path: Path) -> tuple[dict[str, Any], list[TranslateLine]]:
    """Provenance and questions of a file by :func:`run`, by index; a half-written last line is dropped."""
    if not path.is_file():
        raise InputError(f"no results at {path}; `python -m study translate --out {path}` makes them")
    head, *rest = json_lines(path) or [{}]
    if not (isinstance(head, dict) and "translate" in head):
        raise InputError(f"{path} is not a results file of `python -m study translate`")
    lines = [TranslateLine(**x | {"rows": {k: (v[0], v[1]) for k, v in x["rows"].items()}}) for x in rest]
    return head, sorted(lines, key=lambda line: line.index)
