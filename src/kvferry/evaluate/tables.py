"""RESULTS.md and its figures from stored raw results; nothing in them is typed by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.evaluate.raw import Line, Protocol, read
from kvferry.evaluate.stats import Estimate, mean_interval, ratio_interval
from kvferry.evaluate.sweep import PROXY_QUESTION
from kvferry.recipe import Recipe

PROTOCOLS: dict[Protocol, str] = {
    "A": "ask, then ship: the edge knows the question; picture and question are prefilled and compressed together",
    "B": "ship, then ask: the picture's cache is compressed before the question is known; the question is fed on top",
}
CAVEAT = (
    "The models are the project's own small testbed, trained on drawn scenes (see their model cards). "
    "Figures say how the methods compare on these models, not what a multi-billion model would score; "
    "the same command takes any checkpoint."
)


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6A2F")
"""Okabe and Ito's colours, which all eyes tell apart, but for yellow, which is too faint on white, and a brown."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FAINT = "#bdbdbd"
"""For what is drawn beside those."""
SHOWN = 0.25
"""The fraction whose rows stand on the page of results itself."""


@dataclass(frozen=True)
class Places:
    """Where the page of results goes, its figures, and the pages with what is too long for it."""

    page: Path
    figures: Path
    details: Path

    def figure(self, results: Path) -> Path:
        """Of one raw file."""
        return self.figures / f"{results.stem}.png"

    def detail(self, results: Path) -> Path:
        """Of one raw file."""
        return self.details / f"{results.stem}.md"

    def link(self, target: Path) -> str:
        """How the page links to ``target``."""
        return Path(os.path.relpath(target, self.page.parent)).as_posix()


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """A table; its first column and those in ``left`` are set to the left, the others to the right."""
    sides = ["---" if i in (0, *left) else "---:" for i in range(len(head))]
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, *rows))
    first, *others = (f"| {line} |" for line in lines)
    return "\n".join([first, f"|{'|'.join(sides)}|", *others])


def interval(a: Estimate, digits: int = 3) -> str:
    """A figure and its 95 % interval."""
    return f"{a.mean:,.{digits}f} [{a.low:,.{digits}f}, {a.high:,.{digits}f}]"

PICTURES = ("image:", "embeds:")
"""What the names of rows begin with that are no recipes."""


@dataclass(frozen=True)
class Row:
    """One row name (recipe, perhaps with ``proxy`` or ``oracle``) over all questions of one protocol."""

    name: str
    selection: str
    codec: str
    accuracy: Estimate
    of_full: Estimate
    bytes: float
    ratio: float


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


def _order(row: Row) -> tuple[int, str, float]:
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
    selections = list(dict.fromkeys(row.selection for row in sorted(rows, key=_order)))
    heads = [x for c in codecs for x in (f"{c}: accuracy [95 %]", "% of full", "bytes (ratio)")]
    table = []
    for selection in selections:
        name = {"full": "**full** (ceiling)", "none": "**none** (floor: no visual token)"}.get(selection, selection)
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


def draw_curves(out: Path, tables: dict[Protocol, list[Row]], image_bytes: float) -> None:
    """Accuracy against mean bytes: one panel per protocol, a line per selection and codec, the JPEG as a mark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6 * len(tables), 5.6), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    names = sorted({_method(row) for rows in tables.values() for row in rows} - {"full", "none"})
    given = dict(zip(names, zip(PALETTE, MARKERS, strict=True), strict=False))
    for panel, (protocol, rows) in zip(axes, tables.items(), strict=True):
        methods = sorted({_method(row) for row in rows} - {"full", "none"})
        looks = [given.get(method, (FAINT, ".")) for method in methods]
        codecs = list(dict.fromkeys(row.codec for row in rows))
        styles = dict(zip(codecs, ("-", "--", ":", "-."), strict=False))
        for method, (colour, marker) in zip(methods, looks, strict=True):
            for codec, style in styles.items():
                line = sorted(
                    (r for r in rows if r.codec == codec and _method(r) in (method, "full")), key=lambda r: r.bytes
                )
                x = [r.bytes / 1e3 for r in line]
                y = [r.accuracy.mean for r in line]
                panel.plot(x, y, style, color=colour, marker=marker, markersize=3.5, linewidth=1.2)
            panel.plot([], [], color=colour, marker=marker, label=method)
        for codec, style in styles.items():
            panel.plot([], [], style, color="grey", label=codec)
        for row in rows:
            if row.name.startswith("none|bf16"):
                panel.axhline(row.accuracy.mean, color="black", linewidth=0.8, linestyle=":")
                panel.annotate(
                    "floor: no visual token",
                    (0.01, row.accuracy.mean),
                    xycoords=("axes fraction", "data"),
                    ha="left",
                    va="bottom",
                    fontsize=7,
                )
        panel.axvline(image_bytes / 1e3, color="grey", linewidth=0.8)
        panel.annotate(
            "JPEG (quality 90)",
            (image_bytes / 1e3, 0.99),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="top",
            fontsize=7,
            color="dimgrey",
        )
        panel.set_xscale("log")
        panel.set_ylim(0, 1.02)
        panel.set_title(f"Protocol {protocol}", loc="left", fontsize=10)
        panel.set_xlabel("kB on the wire, mean (log)")
        panel.set_ylabel("accuracy")
        panel.legend(fontsize=7.5, ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13))
        panel.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, metadata={"Software": None})


def _method(row: Row) -> str:
    name, _, label = row.selection.partition(" ")
    return f"{name.split('@')[0]} {label}".strip()


def _mean(values: Sequence[float]) -> float:
    array: npt.NDArray[np.float64] = np.asarray(values, np.float64)
    return float(array.mean())


def render(results: Path, places: Places, title: str) -> str:
    """One section of RESULTS.md from one raw file; writes its figure, and the page with all rows."""
    head, lines = read(results)
    protocols: list[Protocol] = [p for p in PROTOCOLS if any(x.protocol == p for x in lines)]
    tables = {p: summarise(lines, p) for p in protocols}
    image = _mean([x.image_bytes for x in lines])
    figure, page = places.figure(results), places.detail(results)
    draw_curves(figure, tables, image)
    text = [f"## {title}", "", provenance_note(head, lines), ""]
    text += [f"![accuracy against bytes]({places.link(figure)})", ""]
    full = [f"# {title}", "", provenance_note(head, lines), ""]
    for protocol, rows in tables.items():
        n = rows[0].accuracy.n
        name = f"Protocol {protocol}: {PROTOCOLS[protocol]}"
        note = [
            f"n = {n} questions, the same for every row (paired). Bytes are whole bitstreams, header and positions "
            f"included, as means; ratio is to the full cache in BF16 "
            f"({_mean([x.bf16_bytes for x in lines if x.protocol == protocol]):,.0f} bytes). "
            f"The pictures as JPEG of quality 90 take {image:,.0f} bytes.",
            *proxy_note([row.name for row in rows]),
            "",
        ]
        short = [row for row in rows if row.selection in ("full", "none") or f"@{SHOWN:g}" in row.selection]
        text += [f"### {name}", "", *note, markdown_table(short), ""]
        text += [f"All fractions, and kinds of question: [{page.name}]({places.link(page)})", ""]
        full += [f"## {name}", "", *note, markdown_table(rows), "", "By kind of question:", ""]
        full += [kind_table(lines, protocol, _kind_rows(rows)), ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(full))
    return "\n".join(text)


def _kind_rows(rows: Sequence[Row]) -> list[str]:
    """The rows worth breaking down: ends, and every method at :data:`SHOWN`, in the first codec."""
    codec = rows[0].codec
    return [
        r.name
        for r in sorted(rows, key=_order)
        if r.codec == codec and (r.selection in ("full", "none") or f"@{SHOWN:g}" in r.selection)
    ]


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
