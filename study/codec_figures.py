"""Bytes against accuracy, KL and attention error: a few families in colours all eyes tell apart, the others grey."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvferry.evaluate.measured import KEPT, MODES, Measured, Point
from kvferry.evaluate.records import Protocol
from kvferry.statistics import Estimate
from study.page import FAINT, MARKERS, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNIFORM = "full|intB"
"""Drawn strongly whether or not it is strong: what every other family is held against."""
INK = "#000000"
"""Of what is sent instead of a cache."""
NAMES = {MODES["image"]: "pictures as JPEG", MODES["embeds"]: "visual embeddings"}

Value = Callable[[str], Estimate | None]


class Panel(NamedTuple):
    """One quantity over bytes; ``better`` is 1 where more is better, -1 where less is."""

    title: str
    label: str
    better: int
    of: Callable[[Measured], Value]


PANELS = (
    Panel("accuracy", "accuracy", 1, lambda x: x.accuracy),
    Panel("distance from the full cache", "KL to the full cache, nats a token (log)", -1, lambda x: x.kl),
    Panel("error of attention outputs", "relative error, mean over layers (log)", -1, lambda x: x.moved),
)


def looks(tables: Mapping[Protocol, Measured]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every family that is drawn strongly, the same in all panels; none is used twice."""
    sent = {MODES["image"]: (INK, "X"), MODES["embeds"]: (INK, "+")}
    strong = dict.fromkeys(
        f for measured in tables.values() for f in (UNIFORM, *measured.leaders()) if f in measured.families()
    )
    others = [(c, m) for c, m in zip(PALETTE, MARKERS, strict=True) if c != INK]
    return sent | dict(zip(strong, others, strict=False))


def edge(points: list[Point], measured: Measured, value: Value, better: int) -> list[Point]:
    """Those of a family that no other of it beats in bytes and in ``value``, by rising bytes.

    ``better`` is 1 where more is better, -1 where less is.
    """
    found: list[Point] = []
    for point in reversed(measured.by_size(points)):
        own = value(point.name)
        best = value(found[-1].name) if found else None
        if own is not None and (best is None or better * own.mean > better * best.mean):
            found.append(point)
    return found


def draw_codecs(out: Path, tables: Mapping[Protocol, Measured]) -> None:
    """Write the figure: a row of panels per protocol: accuracy and, where they were measured, KL and attention error.

    Marks are rows, lines join a family's best of every size, bars are 95 % intervals.
    """
    from matplotlib.figure import Figure

    given = looks(tables)
    everything = tables.values()
    shown = [x for x in PANELS if any(x.of(m)(row) is not None for m in everything for row in m.names)]
    figure = Figure(figsize=(6.4 * len(shown), 5.6 * len(tables) + 0.9), layout="constrained")
    axes = figure.subplots(len(tables), len(shown), squeeze=False)
    for line, (protocol, measured) in zip(axes, tables.items(), strict=True):
        for panel, kind in zip(line, shown, strict=True):
            _draw(panel, measured, given, kind.of(measured), kind.better)
            _guides(panel, measured, kind.of(measured))
            if kind.better < 0:
                panel.set_yscale("log")
            panel.set_ylabel(kind.label)
            panel.set_title(f"Protocol {protocol}, n = {measured.n}: {kind.title}", loc="left", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, metadata={"Software": None})


def _draw(panel: Axes, measured: Measured, given: Mapping[str, tuple[str, str]], value: Value, better: int) -> None:
    """All families, those without a look of their own in grey behind the others."""
    families = measured.families()
    grey = [family for family in families if family not in given]
    for index, family in enumerate(grey):
        _family(panel, measured, families[family], value, better, FAINT, ".", "other families" if index == 0 else None)
    for family, (colour, marker) in given.items():
        if family in families:
            _family(panel, measured, families[family], value, better, colour, marker, NAMES.get(family, family))
    panel.set_xscale("log")
    panel.set_xlabel("bytes on the wire, mean (log)")
    panel.grid(which="major", color="#eeeeee", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _family(
    panel: Axes, measured: Measured, points: list[Point], value: Value, better: int, colour: str, marker: str,
    label: str | None,
) -> None:  # fmt: skip
    """Marks, line and intervals; a logarithmic axis has no place for a KL of nothing."""
    strong = colour != FAINT
    found = {p: e for p in points if (e := value(p.name)) is not None and (better > 0 or e.mean > 0)}
    line = [p for p in edge(points, measured, value, better) if p in found]
    sizes = {p: measured.bytes[p.name] for p in points}
    panel.plot([sizes[p] for p in line], [found[p].mean for p in line], color=colour, linewidth=1.6 if strong else 0.8,
               zorder=3 if strong else 1)  # fmt: skip
    panel.plot([sizes[p] for p in found], [e.mean for e in found.values()], marker, color=colour, label=label,
               zorder=4 if strong else 2, markersize=5.5 if strong else 4)  # fmt: skip
    for point, e in found.items() if strong else ():
        low = e.low if better > 0 else max(e.low, e.mean / 100)
        panel.plot([sizes[point]] * 2, [low, e.high], color=colour, alpha=0.4, linewidth=1.2, zorder=2)


def _guides(panel: Axes, measured: Measured, value: Value) -> None:
    """The floor, and of accuracy the share that counts as good."""
    levels = []
    floor = None if measured.floor is None else value(measured.floor)
    if floor is not None:
        levels.append((floor.mean, "floor: no\nvisual token"))
    if value == measured.accuracy:
        levels.append((KEPT * measured.accuracy(measured.full).mean, f"{KEPT:.0%}\nof full"))
        panel.set_ylim(0, 1.02)
    for y, text in levels:
        panel.axhline(y, color="#444444", linewidth=0.7, linestyle=":", zorder=1)
        panel.text(1.005, y, text, fontsize=7, va="center", transform=panel.get_yaxis_transform())
