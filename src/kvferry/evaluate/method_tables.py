"""Sections of RESULTS.md that compare ways of selecting tokens: methods down, kept fractions across."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.evaluate.needed import bytes_needed
from kvferry.evaluate.stats import Estimate, mean_interval
from kvferry.evaluate.sweep import Line, Protocol, read
from kvferry.evaluate.tables import CAVEAT, PROTOCOLS, kind_table, provenance_note, proxy_note

SHARES = (0.98, 0.95)
"""Shares of the full cache's accuracy for which the bytes needed are asked."""

KIND_FRACTION = 0.1
"""The fraction at which methods are broken down by kind of question."""

_FRACTION = re.compile(r"@([0-9.]+)")


@dataclass(frozen=True)
class Method:
    """One way of selecting under one protocol: its points by falling fraction."""

    name: str
    fractions: tuple[float, ...]
    rows: tuple[str, ...]


def methods_of(rows: Sequence[str]) -> list[Method]:
    """Row names grouped into methods: the recipe without its fraction and codec, and how it was scored."""
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        recipe, _, label = row.partition(" ")
        fraction = _FRACTION.search(recipe)
        if fraction is None:
            continue
        name = _FRACTION.sub("", recipe.split("|")[0]) + (f" ({label})" if label else "")
        found.setdefault(name, []).append((float(fraction[1]), row))
    methods = []
    for name in sorted(found):
        points = sorted(found[name], reverse=True)
        methods.append(Method(name, tuple(f for f, _ in points), tuple(r for _, r in points)))
    return methods


class Answers:
    """Right and wrong, and bytes, of every row of one protocol; only questions that every row answered count."""

    def __init__(self, lines: Sequence[Line], protocol: Protocol) -> None:
        mine = sorted((x for x in lines if x.protocol == protocol), key=lambda x: x.index)
        names = list(mine[0].outcomes)
        self.lines = [x for x in mine if list(x.outcomes) == names]
        self.correct = {n: np.array([x.outcomes[n][0] for x in self.lines], np.float64) for n in names}
        self.bytes = {n: float(np.mean([x.outcomes[n][1] for x in self.lines])) for n in names}
        self.bf16 = float(np.mean([x.bf16_bytes for x in self.lines]))
        full = next((n for n in names if n.startswith("full|")), None)
        if full is None:
            raise InputError("a table needs its ceiling: sweep a recipe such as 'full|bf16' too")
        self.full: str = full
        self.floor = next((n for n in names if n.startswith("none|")), None)
        self.methods = methods_of(names)

    def needed(self, method: Method, share: float) -> Estimate:
        """Bytes that a method needs for a share of full accuracy."""
        sizes = [self.bytes[row] for row in method.rows]
        correct: npt.NDArray[np.float64] = np.stack([self.correct[row] for row in method.rows])
        return bytes_needed(sizes, correct, self.bytes[self.full], self.correct[self.full], share)


def fraction_table(answers: Answers) -> str:
    """Methods down, fractions across: accuracy with its interval; then bytes needed for the shares."""
    fractions = sorted({f for m in answers.methods for f in m.fractions}, reverse=True)
    heads = [f"{f:.0%}" for f in fractions] + [f"bytes for {s:.0%} of full" for s in SHARES]
    text = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    blank = " | ".join([""] * (len(heads) - 1))
    ends = {answers.full: "**full** (ceiling)", answers.floor: "**none** (floor: no visual token)"}
    text.append(f"| {ends[answers.full]} | {_interval(mean_interval(answers.correct[answers.full]))} | {blank} |")
    for method in answers.methods:
        rows = dict(zip(method.fractions, method.rows, strict=True))
        cells = [_interval(mean_interval(answers.correct[rows[f]])) if f in rows else "" for f in fractions]
        cells += [_bytes(answers.needed(method, share), answers.bf16) for share in SHARES]
        text.append(f"| {method.name} | " + " | ".join(cells) + " |")
    if answers.floor is not None:
        text.append(f"| {ends[answers.floor]} | {_interval(mean_interval(answers.correct[answers.floor]))} | {blank} |")
    return "\n".join(text)


def _interval(a: Estimate) -> str:
    return f"{a.mean:.3f} [{a.low:.3f}, {a.high:.3f}]"


def _bytes(a: Estimate, bf16: float) -> str:
    if not np.isfinite(a.mean):
        return "never"
    return f"{a.mean:,.0f} [{a.low:,.0f}, {a.high:,.0f}] ({bf16 / a.mean:.1f}x)"


def draw_methods(out: Path, tables: dict[Protocol, Answers]) -> None:
    """Accuracy against mean bytes with 95 % bands, a panel per protocol; lines where the shares of full lie."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0 * len(tables), 5.2), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (protocol, answers) in zip(axes, tables.items(), strict=True):
        full = float(answers.correct[answers.full].mean())
        for index, method in enumerate(answers.methods):
            rows = [answers.full, *method.rows]
            x = [answers.bytes[row] / 1e3 for row in rows]
            estimates = [mean_interval(answers.correct[row]) for row in rows]
            colour, dash = f"C{index % 10}", ("-", "--", ":", "-.")[index // 10 % 4]
            panel.plot(x, [e.mean for e in estimates], dash, color=colour, marker="o", markersize=3, label=method.name)
            low, high = [e.low for e in estimates], [e.high for e in estimates]
            panel.fill_between(x, low, high, color=colour, alpha=0.08, linewidth=0)
        for share in SHARES:
            panel.axhline(share * full, color="black", linewidth=0.6, linestyle="--")
            panel.text(0.005, share * full, f" {share:.0%} of full", fontsize=7, va="bottom",
                       transform=panel.get_yaxis_transform())  # fmt: skip
        if answers.floor is not None:
            panel.axhline(answers.correct[answers.floor].mean(), color="grey", linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.set_ylim(0, 1.02)
        panel.set_title(f"Protocol {protocol}, n = {len(answers.lines)}", loc="left", fontsize=10)
        panel.set_xlabel("kB of the bitstream, mean (log)")
        panel.set_ylabel("accuracy")
        panel.legend(fontsize=6, ncols=2, frameon=False, loc="lower right")
        panel.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, metadata={"Software": None})


def render(results: Path, figures: Path, title: str) -> str:
    """One section of RESULTS.md from one raw file; writes its figure into `figures`."""
    head, lines = read(results)
    tables = {p: Answers(lines, p) for p in PROTOCOLS if any(x.protocol == p for x in lines)}
    figure = figures / f"{results.stem}.png"
    draw_methods(figure, tables)
    text = [f"## {title}", "", provenance_note(head, lines), "", CAVEAT, "", f"![accuracy against bytes]({figure})", ""]
    for protocol, answers in tables.items():
        text += [
            f"### Protocol {protocol}: {PROTOCOLS[protocol]}",
            "",
            f"n = {len(answers.lines)} questions, the same for every row (paired); accuracy with its 95 % interval at "
            "every kept share of tokens; then the bytes of the whole bitstream "
            f"(codec `{answers.full.partition('|')[2].split(' ')[0]}`) at which a method reaches a share of the "
            "ceiling's accuracy, interpolated between the measured points, and how much smaller than the BF16 cache "
            f"({answers.bf16:,.0f} bytes) that is.",
        ]
        text += proxy_note(list(answers.correct))
        text += ["", fraction_table(answers), "", f"Where each breaks, at {KIND_FRACTION:.0%}:", ""]
        chosen = [m.rows[m.fractions.index(KIND_FRACTION)] for m in answers.methods if KIND_FRACTION in m.fractions]
        ends = [answers.full, *chosen, *([answers.floor] if answers.floor else [])]
        text += [kind_table(lines, protocol, ends), ""]
    return "\n".join(text)
