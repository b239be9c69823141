"""Accuracy against bytes, a panel per protocol: the methods that need least, and what bounds them on either side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.evaluate.records import Protocol
from kvferry.palette import INK, QUIET, scorer_look
from study.methods import SHARES, Method, Methods

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 7
"""The most that one panel holds."""


def drawn(answers: Methods) -> list[Method]:
    """The methods of one panel: of each scorer the form that needs least, and where there is room its plain form.

    ``random`` is always among them, as is the best method that knows the later question, where one was measured.
    """
    ranked = by_need(answers)
    best: dict[str, Method] = {}
    for method in ranked:
        if method.deployable:
            best.setdefault(scorer(method), method)
    plain = {scorer(m): m for m in reversed(ranked) if m.deployable and m.plain == m.base}
    fixed = [plain.get("random", best.pop("random"))] if "random" in best else []
    fixed += [m for m in ranked if not m.deployable][:1]
    room = LINES - len(fixed)
    chosen = list(best.values())[:room]
    beside = [plain[scorer(m)] for m in chosen if scorer(m) in plain and plain[scorer(m)] not in chosen]
    return [*chosen, *(beside if len(beside) <= room - len(chosen) else []), *fixed]


def by_need(answers: Methods) -> list[Method]:
    """Methods by the bytes they need for the first of :data:`SHARES`."""
    return sorted(answers.methods, key=lambda m: (float(answers.needed(m, SHARES[0])[0]), m.name))


def scorer(method: Method) -> str:
    """Its name alone."""
    return method.base.partition(",")[0]


def finding(protocol: str, answers: Methods) -> str:
    """The title: which method needs least for the first of :data:`SHARES`, and what the next scorer needs."""
    first, *others = [m for m in by_need(answers) if m.deployable]
    full = answers.bytes[answers.full]
    least = _kb(answers.needed(first, SHARES[0])[0], full)
    text = f"Protocol {protocol}: {first.name} holds {SHARES[0]:.0%} of full in {least}"
    other = next((m for m in others if scorer(m) != scorer(first)), None)
    if other is None:
        return text
    return f"{text},\nthe next scorer, {scorer(other)}, in {_kb(answers.needed(other, SHARES[0])[0], full)}"


def _kb(size: float, full: float) -> str:
    return f"{size / 1e3:.0f} kB" if size < full else "no less than full"


def draw_methods(out: Path, tables: Mapping[Protocol, Methods]) -> None:
    """Write the figure; bands are 95 % intervals. A method has its own colour, the same in every figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 * len(tables), 5.6), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (protocol, answers) in zip(axes, tables.items(), strict=True):
        for method in drawn(answers):
            _draw(panel, answers, method)
        _guides(panel, answers)
        panel.set_title(finding(protocol, answers), loc="left", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, metadata={"Software": None})


def _draw(panel: Axes, answers: Methods, method: Method) -> None:
    rows = [answers.full, *method.rows]
    estimates = [answers.accuracy(row) for row in rows]
    x = [answers.bytes[row] / 1e3 for row in rows]
    colour, marker = scorer_look(method.base)
    style = "-" if method.plain == method.base else "--"
    label = method.name
    if not method.deployable:
        colour, marker, style, label = INK, "", ":", f"bound: {method.name}"
    panel.plot(
        x, [e.mean for e in estimates], style, color=colour, marker=marker, markersize=4.5, linewidth=1.6, zorder=3,
        label=label,
    )  # fmt: skip
    panel.fill_between(
        x, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.12, linewidth=0, zorder=2
    )


def _guides(panel: Axes, answers: Methods) -> None:
    full = answers.accuracy(answers.full).mean
    panel.axhline(SHARES[0] * full, color=QUIET, linewidth=0.8, linestyle=":", zorder=1)
    panel.text(0.006, SHARES[0] * full, f"{SHARES[0]:.0%} of full", fontsize=7.5, va="bottom", color=INK,
               transform=panel.get_yaxis_transform())  # fmt: skip
    if answers.floor is not None:
        floor = answers.accuracy(answers.floor).mean
        panel.axhline(floor, color=QUIET, linewidth=0.8, linestyle=":", zorder=1)
        panel.text(0.996, floor, "floor: no visual token", fontsize=7.5, va="bottom", ha="right", color=INK,
                   transform=panel.get_yaxis_transform())  # fmt: skip
    panel.set_xscale("log")
    panel.set_ylim(0, 1.02)
    panel.set_xlabel(f"kB of the bitstream, mean of {answers.n} questions (log)")
    panel.set_ylabel("accuracy")
    panel.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    panel.spines[["top", "right"]].set_visible(False)
