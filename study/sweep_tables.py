"""The section of RESULTS.md and the figure of an ordinary sweep: selections down, codecs across."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvferry.evaluate.records import Protocol, read
from kvferry.evaluate.tables import (
    PICTURES,
    PROTOCOLS,
    Row,
    few_note,
    kind_table,
    markdown_table,
    order,
    provenance_note,
    proxy_note,
    summarise,
)
from kvferry.palette import INK, QUIET, scorer_look
from study.page import SHOWN, Places

LINES = 7
"""The most that one panel holds."""


def draw_curves(out: Path, tables: dict[Protocol, list[Row]], image_bytes: float) -> None:
    """Accuracy against mean bytes: a panel per protocol, a line per selection in the last codec, the JPEG as a mark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6 * len(tables), 5.0), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (protocol, rows) in zip(axes, tables.items(), strict=True):
        recipes = [r for r in rows if not r.name.startswith(PICTURES)]
        codec = recipes[-1].codec
        methods = sorted({_method(row) for row in recipes} - {"full", "none"})[:LINES]
        for method in methods:
            line = sorted(
                (r for r in recipes if r.codec == codec and _method(r) in (method, "full")), key=lambda r: r.bytes
            )
            colour, marker = scorer_look(method.partition(" ")[0])
            panel.plot(
                [r.bytes / 1e3 for r in line], [r.accuracy.mean for r in line], color=colour, marker=marker,
                linestyle=":" if " " in method else "-", markersize=4, linewidth=1.4, label=method,
            )  # fmt: skip
        for row in recipes:
            if row.name.startswith("none|bf16"):
                panel.axhline(row.accuracy.mean, color=QUIET, linewidth=0.8, linestyle=":")
                panel.text(0.01, row.accuracy.mean, "floor: no visual token", fontsize=7.5, va="bottom", color=INK,
                           transform=panel.get_yaxis_transform())  # fmt: skip
        panel.axvline(image_bytes / 1e3, color=QUIET, linewidth=0.8)
        panel.text(image_bytes / 1e3, 0.02, "JPEG 90", rotation=90, ha="right", va="bottom", fontsize=7.5, color=INK,
                   transform=panel.get_xaxis_transform())  # fmt: skip
        panel.set_xscale("log")
        panel.set_ylim(0, 1.02)
        panel.set_title(f"Protocol {protocol}, all in {codec}", loc="left", fontsize=10)
        panel.set_xlabel("kB on the wire, mean (log)")
        panel.set_ylabel("accuracy")
        panel.legend(fontsize=8, frameon=False, loc="lower right")
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
            *few_note([row.scored for row in rows]),
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
        for r in sorted(rows, key=order)
        if r.codec == codec and (r.selection in ("full", "none") or f"@{SHOWN:g}" in r.selection)
    ]
