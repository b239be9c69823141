"""The section of RESULTS.md on mode translate: how much of the gap between two models it closes, and what is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.evaluate.records import read as read_sweep
from kvferry.evaluate.tables import PROTOCOLS, interval, markdown
from kvferry.statistics import difference_interval, mcnemar, mean_interval, ratio_interval
from study.codec_tables import TESTS, p_text, percent
from study.page import Places
from study.scout import read as read_scout
from study.translate import ALONE, NOTHING, SMALL, TINY, TranslateLine, read

Floats = npt.NDArray[np.float64]
AIM = 0.5
"""Of the gap between the two models' accuracies, at no more bytes than the edge's own cache in its ``tiny`` preset."""
FULL = "cloud, its own full cache"


class Compared:
    """All rows on the questions that every file has: right answers and bytes, ``[n]``.

    Parameters
    ----------
    raw : path
        The folder of raw files: the same questions as pictures and embeddings, and in mode scout, are in others.
    """

    def __init__(self, lines: list[TranslateLine], raw: Path) -> None:
        others = _others(raw)
        self.lines = [line for line in lines if all(line.index in rows for rows in others.values())]
        self.kinds = [line.kind for line in self.lines]
        self.right: dict[str, Floats] = {}
        self.bytes: dict[str, Floats] = {}
        own = {row: {x.index: x.rows[row] for x in self.lines} for row in self.lines[0].rows}
        for row, found in (own | others).items():
            both = np.array([found[line.index] for line in self.lines], np.float64)
            self.right[row], self.bytes[row] = both[:, 0], both[:, 1]

    @property
    def sent(self) -> list[str]:
        """The recipes in mode translate, by falling size."""
        rows = [row for row in self.lines[0].rows if row not in (ALONE, SMALL, NOTHING)]
        return sorted(rows, key=lambda row: -self.bytes[row].mean())

    def closed(self, row: str) -> Any:
        """Share of the gap between the edge's and the cloud's accuracy."""
        return ratio_interval(self.right[row] - self.right[ALONE], self.right[FULL] - self.right[ALONE])


def _others(raw: Path) -> dict[str, dict[int, tuple[float, float]]]:
    """Right answers and bytes by question of what other studies asked of the same two models."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    if (raw / "scout-edge.jsonl").is_file():
        head, lines = read_scout(raw / "scout-edge.jsonl")
        names = [f"{s}@{f:g}" for s in head["scout"]["scorers"] for f in head["scout"]["fractions"]]
        at = names.index("vlcache@0.25")
        found[FULL] = {x.index: (x.full, 0) for x in lines}
        found["scout:vlcache@0.25"] = {x.index: (x.found[at].edge, x.found[at].sent + x.image_bytes) for x in lines}
    if (raw / "codecs-cloud.jsonl").is_file():
        _, asked = read_sweep(raw / "codecs-cloud.jsonl")
        for row in asked[0].outcomes:
            if row.startswith(("image:", "embeds:")):
                found[row] = {x.index: (x.outcomes[row].correct, x.outcomes[row].bytes) for x in asked}
    return found


def verdict(found: Compared) -> str:
    """Whether the aim is met, in words with numbers."""
    room = found.bytes[SMALL].mean()
    fits = [row for row in found.sent if found.bytes[row].mean() <= room]
    best = max(fits, key=lambda row: found.right[row].mean())
    closed = found.closed(best)
    where = "met" if closed.low >= AIM else "not decided" if closed.high >= AIM else "missed"
    edge, cloud = (mean_interval(found.right[row]).mean for row in (ALONE, FULL))
    everything = max(found.sent, key=lambda row: found.right[row].mean())
    return (
        f"The aim was to close half of the gap between the edge ({edge:.3f}) and the cloud ({cloud:.3f}) at no more "
        f"bytes than the edge's own cache takes in its `tiny` preset ({room:,.0f}): **{where}**. The best of those "
        f"sizes, `{best}`, closes {percent(closed)} % of it with {found.bytes[best].mean():,.0f} bytes; at any size "
        f"`{everything}` closes {percent(found.closed(everything))} %."
    )


def fact(folder: Path, places: Places) -> Iterator[str]:
    """What a reader should take away."""
    file = folder / "translate-edge.jsonl"
    if file.is_file():
        found = Compared(read(file)[1], folder)
        yield (
            f"* **An edge's cache as one of a larger model's own** (mode `translate`, small shipped models, protocol "
            f"A, n = {len(found.lines)}): {verdict(found)} [More]({places.link(places.detail(file))})."
        )


def rows_table(found: Compared) -> str:
    """Every row: bytes, accuracy, against the edge, share of the gap."""
    pictures = [row for row in found.right if row.startswith(("image:", "embeds:", "scout:"))]
    order = [FULL, *sorted(pictures, key=lambda row: -found.bytes[row].mean()), *found.sent, ALONE, SMALL, NOTHING]
    names = {ALONE: "edge, its own full cache", SMALL: f"edge, from `{TINY}`", NOTHING: "cloud, from the words alone"}
    table = []
    for row in order:
        name = names.get(row, row if row == FULL else f"`{row}`" if row in pictures else f"`translate:{row}`")
        against = difference_interval(found.right[row], found.right[ALONE])
        size = f"{found.bytes[row].mean():,.0f}" if found.bytes[row].any() else "none"
        gap = "" if row in (ALONE, NOTHING, FULL) else percent(found.closed(row))
        p = "" if row == ALONE else p_text(mcnemar(found.right[row], found.right[ALONE]))
        table.append([name, size, interval(mean_interval(found.right[row])), percent(against), p, gap])
    head = ["", "bytes", "right [95 %]", "minus edge alone: points", "p", "% of the gap closed"]
    return markdown(head, table)


def kinds_table(found: Compared) -> str:
    """Accuracy per kind of question: what is lost where."""
    rows = [ALONE, FULL, found.sent[0], TINY, NOTHING]
    kinds = list(dict.fromkeys(found.kinds))
    inside = {kind: np.array([x == kind for x in found.kinds]) for kind in kinds}
    table = [
        [kind, str(int(here.sum())), *(f"{found.right[row][here].mean():.3f}" for row in rows)]
        for kind, here in inside.items()
    ]
    names = ["edge alone", "cloud", f"`translate:{rows[2]}`", f"`translate:{TINY}`", "words alone"]
    return markdown(["kind", "n", *names], table)


def errors_table(lines: list[TranslateLine]) -> str:
    """Error of the translated keys and values, layer by layer."""
    each = np.array([line.errors for line in lines if line.errors], np.float64)
    table = [
        [str(layer), *(interval(mean_interval(each[:, layer, side])) for side in range(2))]
        for layer in range(each.shape[1])
    ]
    return markdown(["layer of the cloud", "keys", "values"], table)


def render(results: Path, places: Places, title: str) -> str:
    """The section of one raw file."""
    head, lines = read(results)
    found = Compared(lines, results.parent)
    trial, made = head["translate"], head["translator"]
    some = sum(bool(line.errors) for line in lines)
    text = [
        f"## {title}", "",
        f"Edge `{trial['edge']}`, cloud `{trial['cloud']}`, {head['dtype']}, split `{trial['split']}`, n = "
        f"{len(found.lines)} questions, the same for every row (paired). Protocol A: {PROTOCOLS['A']}. The translator "
        f"(digest `{trial['translator'][:12]}`, {made['hidden']} units, {made['multiplications']:,} multiplications a "
        f"token) was learned from {made['data']} by `{made['command']}`. Rows of pictures, embeddings and mode scout, "
        f"and the cloud's full cache, are those of the other sections, in bfloat16. Embeddings need the cloud's own "
        f"vision tower on the edge. Made by `{head['command']}` at commit `{head['commit'][:12]}`, torch "
        f"{head['torch']}, {head['machine']}. {TESTS}.",
        "", verdict(found), "", rows_table(found), "",
        "What is lost where, by kind of question:", "", kinds_table(found), "",
        "Error of the translated keys and values as a share of their squared distance from the mean, "
        f"`translate:full`, {some} questions:", "", errors_table(lines), "",
    ]  # fmt: skip
    return "\n".join(text)
