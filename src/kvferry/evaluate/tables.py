"""Tables of a sweep's results: every row with its interval, by protocol and by kind of question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvferry.errors import InputError
from kvferry.evaluate.records import Line, Outcome, Protocol
from kvferry.evaluate.sweep import PROXY_QUESTION
from kvferry.recipe import Recipe
from kvferry.selection import SCORED
from kvferry.statistics import Estimate, mean_interval, ratio_interval

PROTOCOLS: dict[Protocol, str] = {
    "A": "ask, then ship: the edge knows the question; picture and question are prefilled and compressed together",
    "B": "ship, then ask: the picture's cache is compressed before the question is known; the question is fed on top",
}
CAVEAT = (
    "The models are the project's own small testbed, trained on drawn scenes (see their model cards). "
    "Figures say how the methods compare on these models, not what a multi-billion model would score; "
    "the same command takes any checkpoint."
)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """A table; its first column and those in ``left`` are set to the left, the others to the right."""
    sides = ["---" if i in (0, *left) else "---:" for i in range(len(head))]
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, *rows))
    first, *others = (f"| {line} |" for line in lines)
    return "\n".join([first, f"|{'|'.join(sides)}|", *others])


def interval(a: Estimate, digits: int = 3) -> str:
    """A figure and its 95 % interval."""
    return f"{a.mean:,.{digits}f} [{a.low:,.{digits}f}, {a.high:,.{digits}f}]"


FEW = "†"
"""Marks rows whose scorer chose less than :data:`~kvferry.selection.choose.SCORED` of what was kept."""


def chose_little(scored: float | None) -> bool:
    """Whether a row with this share of scored tokens says more of sinks and guarantees than of its scorer."""
    return scored is not None and scored < SCORED


def mean_scored(shares: Sequence[float | None]) -> float | None:
    """Over the questions of a row; None where it is not known of all."""
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if known and len(known) == len(shares) else None


def few_note(scored: Sequence[float | None]) -> list[str]:
    """What :data:`FEW` means, where a table has such rows."""
    if not any(map(chose_little, scored)):
        return []
    return [
        "",
        f"{FEW} The scorer chose less than {SCORED:.0%} of the tokens that were kept: the prompt's first tokens and "
        "what is guaranteed took the others. Such a row says little of its scorer.",
    ]


PICTURES = ("image:", "embeds:")
"""What the names of rows begin with that are no recipes."""


@dataclass(frozen=True)
class Row:
    """One row name (recipe, perhaps with ``proxy`` or ``oracle``) over all questions of one protocol.

    ``scored`` is the share of the kept tokens that the scorer chose, the mean over questions; None where it is not
    known or there was no choice.
    """

    name: str
    selection: str
    codec: str
    accuracy: Estimate
    of_full: Estimate
    bytes: float
    ratio: float
    scored: float | None = None

    @property
    def label(self) -> str:
        """Its selection, marked where the scorer chose little; :func:`few_note` says what the mark means."""
        return f"{self.selection} {FEW}" if chose_little(self.scored) else self.selection


def summarise(lines: Sequence[Line], protocol: Protocol) -> list[Row]:
    """All rows of one protocol, paired: only questions that every row answered count."""
    lines = sorted((x for x in lines if x.protocol == protocol), key=lambda x: x.index)
    if not lines:
        raise InputError(f"the results hold no questions under protocol {protocol}")
    names = list(lines[0].outcomes)
    lines = [x for x in lines if list(x.outcomes) == names]
    correct = {n: np.array([x.outcomes[n][0] for x in lines], float) for n in names}
    sizes = {n: np.array([x.outcomes[n][1] for x in lines], float) for n in names}
    bf16 = np.array([x.bf16_bytes for x in lines], float)
    full = next((correct[n] for n in names if n.startswith("full|bf16")), None)
    if full is None:
        raise InputError("a table needs its ceiling: sweep the recipe 'full|bf16' too")
    rows = []
    for name in names:
        recipe, _, label = name.partition(" ")
        selection, _, codec = recipe.partition("|")
        rows.append(
            Row(
                name=name,
                selection=f"{selection} ({label})" if label else selection,
                codec=codec,
                accuracy=mean_interval(correct[name]),
                of_full=ratio_interval(correct[name], full),
                bytes=float(sizes[name].mean()),
                ratio=float(bf16.mean() / sizes[name].mean()),
                scored=mean_scored([Outcome(*x.outcomes[name]).scored for x in lines]),
            )
        )
    return rows


def by_kind(lines: Sequence[Line], protocol: Protocol, names: Sequence[str]) -> list[tuple[str, int, list[float]]]:
    """Accuracy per question kind: ``(kind, n, accuracy per row name)``."""
    lines = [x for x in lines if x.protocol == protocol]
    table = []
    for kind in sorted({x.kind for x in lines}):
        of_kind = [x for x in lines if x.kind == kind]
        shares = [float(np.mean([x.outcomes[name][0] for x in of_kind])) for name in names]
        table.append((kind, len(of_kind), shares))
    return table


def order(row: Row) -> tuple[int, str, float]:
    """Ceiling first, floor last, methods by name and falling fraction between; then pictures and embeddings."""
    if row.name.startswith(PICTURES):
        return 3, row.name.partition(":")[0], -row.bytes
    recipe = Recipe.parse(row.name.split(" ")[0])
    method, _, label = row.selection.partition(" ")
    rank = 0 if method == "full" else 2 if method == "none" else 1
    return rank, method.split("@")[0] + label, -recipe.fraction


def markdown_table(rows: Sequence[Row]) -> str:
    """Selections down, codecs across: accuracy with interval, share of full, bytes, ratio to BF16."""
    codecs = list(dict.fromkeys(row.codec for row in rows))
    cells = {(row.selection, row.codec): row for row in rows}
    selections = list(dict.fromkeys(row.selection for row in sorted(rows, key=order)))
    heads = [x for c in codecs for x in (f"{c}: accuracy [95 %]", "% of full", "bytes (ratio)")]
    table = []
    for selection in selections:
        label = next((row.label for row in rows if row.selection == selection and FEW in row.label), selection)
        name = {"full": "**full** (ceiling)", "none": "**none** (floor: no visual token)"}.get(selection, label)
        parts = [name]
        for codec in codecs:
            row = cells.get((selection, codec))
            if row is None:
                parts += ["", "", ""]
                continue
            parts += [
                interval(row.accuracy),
                f"{100 * row.of_full.mean:.1f}",
                f"{row.bytes:,.0f} ({row.ratio:.1f}x)",
            ]
        table.append(parts)
    return markdown(["selection", *heads], table)


def kind_table(lines: Sequence[Line], protocol: Protocol, names: Sequence[str]) -> str:
    """Question kinds down, chosen rows across."""
    rows = [[kind, str(n), *(f"{s:.2f}" for s in shares)] for kind, n, shares in by_kind(lines, protocol, names)]
    return markdown(["kind", "n", *(f"`{n}`" for n in names)], rows)


def proxy_note(names: Sequence[str]) -> list[str]:
    """What proxy and oracle mean, where a table has such rows."""
    if not any(name.endswith(" oracle") for name in names):
        return []
    return [
        "",
        f'Query-aware rows: *proxy* scores with the fixed question "{PROXY_QUESTION}"; *oracle* scores with '
        "the question that comes later, which no deployment can do, and bounds what knowing it is worth.",
    ]


def provenance_note(head: dict[str, Any], lines: Sequence[Line]) -> str:
    """Model, split, questions, command, commit, versions and machine, in two sentences."""
    sweep = head["sweep"]
    indices = {x.index for x in lines}
    command = head.get("command") or f"kvferry sweep --model {sweep['model']} ..."
    return (
        f"Model `{sweep['model']}` (fingerprint `{head['fingerprint'][:12]}`, {head['dtype']}), split "
        f"`{sweep['split']}`, questions {min(indices)} to {max(indices)}. Made by `{command}` at commit "
        f"`{head['commit'][:12]}{'+changes' if head['commit'].endswith('+changes') else ''}`, "
        f"torch {head['torch']}, transformers {head['transformers']}, {head['machine']}."
    )
