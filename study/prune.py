"""Visual tokens dropped inside prefill, against dropping as many after it, and against other ways to save as much work.

Protocol A. All caches are INT4, so that what differs is which tokens each layer holds. Behind every pruned prefill
stand recipes that keep as many tokens after a whole prefill (``q2c`` by the same evidence of the last layer, and
``leaveout``), and a prefill that is pruned after the first layer to as many visual tokens as take the same operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvferry.evaluate.tables import interval, markdown
from kvferry.models.pruning import Pruning, prefill_flops
from kvferry.models.tower_pruning import TowerPruning
from kvferry.recipe import Recipe, compress, decompress
from kvferry.selection.eviction import kept_count
from kvferry.statistics import difference_interval, mean_interval, ratio_interval
from kvferry.testbed.data import sample
from study.codec_tables import percent
from study.long_runs import Plan, Record, answer_ids, forced, read, says
from study.long_tables import column, words
from study.page import Places

if TYPE_CHECKING:
    from kvferry.evidence import Prefilled
    from kvferry.models import VLM

CODEC = "int4"
FULL, FLOOR = f"full|{CODEC}", f"none|{CODEC}"
SETTINGS = ((2, 0.25), (2, 0.1))
"""First pruned layer and the share of visual tokens that goes on."""
BEFORE = (0.5, 0.25)
"""Share of visual tokens that reaches the language model at all, by the vision tower's attention."""
AFTER = ("q2c", "leaveout")
"""Scorers that choose as many tokens after a whole prefill."""


def name(layer: int, fraction: float, looks: str = "question") -> str:
    """A pruned prefill's row."""
    return f"layer {layer}, {fraction:.0%}" + ("" if looks == "question" else f", {looks} token")


def before(fraction: float) -> str:
    """The row of a prompt pruned by the tower."""
    return f"tower, {fraction:.0%}"


def beside(row: str, scorer: str) -> str:
    """The row that keeps as many tokens after prefill, or takes as many operations (``early``)."""
    return f"{row}: {scorer}"


def run(vlm: VLM, plan: Plan, index: int) -> Record:
    """One question by every row.

    Returns
    -------
    dict
        ``bytes`` of the whole bitstream, ``right`` and, relative to a whole prefill, ``work`` by row.
    """
    drawn = sample(plan.split, index)
    wanted = [request for scorer in AFTER for request in Recipe.parse(f"{scorer}@0.5").requests]
    prefill = partial(vlm.prefill, vlm.look(drawn.images), drawn.question)
    whole = prefill(requests=tuple(dict.fromkeys(wanted)))
    n, visual = len(whole.cache.layout), int(whole.cache.layout.visual.sum())
    made: dict[str, tuple[Prefilled, str]] = {FULL: (whole, FULL), FLOOR: (whole, FLOOR)}
    for layer, fraction in SETTINGS:
        row = name(layer, fraction)
        pruned = prefill(prune=Pruning(layer, fraction))
        made[row] = pruned, FULL
        last = name(layer, fraction, "last")
        made[last] = prefill(prune=Pruning(layer, fraction, "last")), FULL
        made |= _after(row, whole, pruned)
        if layer > 1:
            early = _early(vlm, n, visual, prefill_flops(vlm.model, n, pruned.cache))
            made[beside(row, "early")] = prefill(prune=Pruning(1, early)), FULL
    for fraction in BEFORE:
        pruned = vlm.prefill(drawn.images, drawn.question, prune=TowerPruning(fraction))
        made[before(fraction)] = pruned, FULL
        made |= _after(before(fraction), whole, pruned)
    blobs = {row: compress(source, recipe) for row, (source, recipe) in made.items()}
    truth = answer_ids(vlm, drawn.answer)
    logits = forced(vlm, {row: decompress(blob) for row, blob in blobs.items()}, truth)
    work = {row: prefill_flops(vlm.model, n, source.cache) for row, (source, _) in made.items()}
    return {
        "kind": drawn.kind,
        "bytes": {row: len(blob) for row, blob in blobs.items()},
        "work": {row: round(flops / work[FULL], 4) for row, flops in work.items()},
        "right": {row: int(says(vlm, logits[row], truth)) for row in made},
    }


def _after(row: str, whole: Prefilled, pruned: Prefilled) -> dict[str, tuple[Prefilled, str]]:
    """Rows that keep as many tokens as a pruned prefill after a whole one."""
    share = sum(pruned.cache.kept) / (len(pruned.cache.kept) * pruned.cache.length)
    return {beside(row, scorer): (whole, f"{scorer}@{share:.6f}|{CODEC}") for scorer in AFTER}


def _early(vlm: VLM, n: int, visual: int, flops: int) -> float:
    """The largest share of visual tokens at which pruning after the first layer takes at most ``flops``."""
    layers, whole = vlm.layers, prefill_flops(vlm.model, n)
    low, high = 1, visual
    while low < high:
        count = (low + high + 1) // 2
        fits = whole + (layers - 1) * prefill_flops(vlm.model, n - visual + count) <= layers * flops
        low, high = (count, high) if fits else (low, count - 1)
    assert kept_count(low / visual, visual) == low
    return low / visual


def fact(folder: Path, places: Places) -> Iterator[str]:
    """What a reader should take away."""
    file = folder / "prune-cloud.jsonl"
    if not file.is_file():
        return
    _, records = read(file)

    def told(row: str) -> str:
        kept = ratio_interval(column(records, "right", row), column(records, "right", FULL))
        return f"{percent(kept)} % at {np.mean(column(records, 'work', row)):.2f} of the work"

    layer, fraction = max(SETTINGS, key=lambda x: x[1])
    row = name(layer, fraction)
    yield (
        f"* **Visual tokens dropped inside prefill** (small shipped model, protocol A, n = {len(records)}), in share "
        f"of the full cache's accuracy: {fraction:.0%} kept from layer {layer} on, by what the question looks at, "
        f"{told(row)}; by the last token, as FastV has it, {told(name(layer, fraction, 'last'))}; from layer 1 on "
        f"{told(beside(row, 'early'))}; as many kept by `leaveout` after prefill {told(beside(row, 'leaveout'))}. "
        f"[More]({places.link(places.detail(file))})."
    )


def render(results: Path, places: Places, title: str) -> str:
    """The section of one raw file."""
    head, records = read(results)
    right = {row: column(records, "right", row) for row in records[0]["right"]}

    def cells(row: str) -> list[str]:
        size = f"{np.mean(column(records, 'bytes', row)):,.0f}"
        work = f"{np.mean(column(records, 'work', row)):.2f}"
        found = mean_interval(right[row])
        return [work, size, interval(found), percent(ratio_interval(right[row], right[FULL]))]

    shown = [[f"`{FULL}` (ceiling)", *cells(FULL)], [f"`{FLOOR}` (floor: no visual token)", *cells(FLOOR)]]
    against = []
    for layer, fraction in SETTINGS:
        row, last = name(layer, fraction), name(layer, fraction, "last")
        shown += [[row, *cells(row)], [last, *cells(last)]]
        others = {f"{scorer} after prefill": beside(row, scorer) for scorer in AFTER}
        others |= {"ranked by the last token": last}
        others |= {"layer 1, equal work": beside(row, "early")} if layer > 1 else {}
        for what, other in others.items():
            gap = difference_interval(right[row], right[other])
            against.append([row, what, *cells(other)[:3], interval(gap), words(gap)])
    for row in filter(right.__contains__, map(before, BEFORE)):  # raw files from before there was such pruning lack it
        shown.append([row, *cells(row)])
        for scorer in AFTER:
            gap = difference_interval(right[row], right[beside(row, scorer)])
            against.append([row, f"{scorer} after prefill", *cells(beside(row, scorer))[:3], interval(gap), words(gap)])
    tower = (
        " Rows of the tower drop and merge tokens before the language model, by its attention (VisionZip), "
        "whose own work is not counted in any row."
        if before(BEFORE[0]) in right
        else ""
    )
    return "\n".join(
        [
            f"## {title}",
            "",
            f"Protocol A, n = {len(records)} questions of the {head['plan']['split']} split, raw: `{results.name}`, by "
            f"`{head['command']}`. Visual tokens are dropped inside prefill, from a layer on, by what the question "
            "(or the last token, as FastV has it) looks at in the layer before; all caches are INT4. Work is that of "
            "the language model's prefill by formula, a whole one being 1; bytes are whole bitstreams." + tower,
            "",
            markdown(("first pruned layer, visual tokens kept", "work", "bytes", "accuracy", "% of full"), shown),
            "",
            "Set against as many tokens kept after a whole prefill, and against other ways to take as much work; "
            'differences are paired, 95 %; "no difference shown" where the interval holds 0:',
            "",
            markdown(
                ("pruned", "against", "its work", "its bytes", "its accuracy", "pruned minus it", "shows"),
                against,
                left=(1, 6),
            ),
            "",
        ]
    )
