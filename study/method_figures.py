"""Accuracy against bytes, a panel per protocol: a few methods in colours that all eyes tell apart, the others grey."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.evaluate.records import Protocol
from study.methods import SHARES, Method, Methods
from study.page import FAINT, MARKERS, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def looks(tables: Mapping[Protocol, Methods]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every base that is drawn strongly, the same in all panels; none is used twice."""
    bases = dict.fromkeys(m.base for answers in tables.values() for m in answers.strongest())
    return dict(zip(bases, zip(PALETTE, MARKERS, strict=True), strict=False))


def draw_methods(out: Path, tables: Mapping[Protocol, Methods]) -> None:
    """Write the figure; lines show where the shares of full accuracy lie, bands are 95 % intervals."""
    from matplotlib.figure import Figure

    given = looks(tables)
    figure = Figure(figsize=(7.2 * len(tables), 6.2), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (protocol, answers) in zip(axes, tables.items(), strict=True):
        strong = [m for m in answers.strongest() if m.base in given]
        bound = next((m for m in answers.ranked() if not m.deployable), None)
        others = [m for m in answers.methods if m not in strong and m != bound]
        for index, method in enumerate(others):
            x, y = _line(answers, method)
            label = "other methods" if index == 0 else None
            panel.plot(x, [e[0] for e in y], color=FAINT, linewidth=0.8, zorder=1, label=label)
        if bound is not None:
            x, y = _line(answers, bound)
            panel.plot(x, [e[0] for e in y], "-.", color="#555555", linewidth=1.4, label=f"best bound: {bound.name}")
        for method in strong:
            colour, marker = given[method.base]
            x, y = _line(answers, method)
            style = "-" if method.aware else "--"
            panel.plot(
                x, [e[0] for e in y], style, color=colour, marker=marker, markersize=4.5, linewidth=1.6, zorder=3,
                label=f"{method.name}, {'aware' if method.aware else 'agnostic'}",
            )  # fmt: skip
            panel.fill_between(x, [e[1] for e in y], [e[2] for e in y], color=colour, alpha=0.12, linewidth=0, zorder=2)
        _guides(panel, answers)
        panel.set_title(f"Protocol {protocol}, n = {answers.n}", loc="left", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, metadata={"Software": None})


def _line(answers: Methods, method: Method) -> tuple[list[float], list[tuple[float, float, float]]]:
    """Kilobytes, and accuracy with its interval, from the full cache down."""
    rows = [answers.full, *method.rows]
    estimates = [answers.accuracy(row) for row in rows]
    return [answers.bytes[row] / 1e3 for row in rows], [(e.mean, e.low, e.high) for e in estimates]


def _guides(panel: Axes, answers: Methods) -> None:
    full = answers.accuracy(answers.full).mean
    for share in SHARES:
        panel.axhline(share * full, color="#444444", linewidth=0.6, linestyle=":", zorder=1)
    panel.text(0.004, SHARES[0] * full, " and ".join(f"{s:.0%}" for s in SHARES) + " of full", fontsize=7, va="bottom",
               transform=panel.get_yaxis_transform())  # fmt: skip
    if answers.floor is not None:
        floor = answers.accuracy(answers.floor).mean
        panel.axhline(floor, color="#444444", linewidth=0.6, zorder=1)
        panel.text(0.996, floor, "floor: no visual token", fontsize=7, va="bottom", ha="right",
                   transform=panel.get_yaxis_transform())  # fmt: skip
    panel.set_xscale("log")
    panel.set_ylim(0, 1.02)
    panel.set_xlabel("kB of the bitstream, mean (log)")
    panel.set_ylabel("accuracy")
    panel.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    panel.spines[["top", "right"]].set_visible(False)
