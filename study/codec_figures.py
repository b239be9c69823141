"""Bytes against accuracy, KL and attention error: at most seven families, each codec in its own colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvferry.evaluate.measured import KEPT, MODES, Measured, Point
from kvferry.evaluate.records import Protocol
from kvferry.palette import INK, QUIET, Look, codec_look
from kvferry.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNIFORM = "full|intB"
"""Drawn strongly whether or not it is strong: what every other family is held against."""
LINES = 7
"""The most that one panel holds."""
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


def drawn(measured: Measured) -> list[str]:
    """Families of a panel: what is sent instead of a cache, uniform integers, and those that need least.

    Of families that would look alike (a codec with and without a lossless stage) only the first.
    """
    families = measured.families()
    sent = [f for f in MODES.values() if f in families]
    caches = {look(f): f for f in reversed([UNIFORM, *measured.leaders(len(families))]) if f in families}
    return [*list(reversed(caches.values()))[: LINES - len(sent)], *sent]


def look(family: str) -> tuple[Look, str]:
    """Colour and marker of a codec, and the style of its line: dashed where only some tokens are sent."""
    selection, bar, codec = family.partition("|")
    return codec_look(codec if bar else family), "-" if selection == "full" or not bar else "--"


def finding(measured: Measured, kind: Panel) -> str:
    """The title: what the smallest good cache takes, and what uniform integers take."""
    caches = [p for p in measured.points.values() if p.recipe and p.deployable and p.name != measured.full]
    best = measured.smallest_good(caches)
    plain = measured.smallest_good(measured.families().get(UNIFORM, []))
    if kind is not PANELS[0] or best is None:
        return kind.title
    text = f"{best.name.partition('|')[2]} holds {KEPT:.0%} of full in {measured.bytes[best.name]:,.0f} bytes"
    return text if plain is None else f"{text},\nplain integers in {measured.bytes[plain.name]:,.0f}"


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

    everything = tables.values()
    shown = [x for x in PANELS if any(x.of(m)(row) is not None for m in everything for row in m.names)]
    figure = Figure(figsize=(6.4 * len(shown), 5.6 * len(tables) + 0.9), layout="constrained")
    axes = figure.subplots(len(tables), len(shown), squeeze=False)
    for line, (protocol, measured) in zip(axes, tables.items(), strict=True):
        for panel, kind in zip(line, shown, strict=True):
            _draw(panel, measured, kind.of(measured), kind.better)
            _guides(panel, measured, kind.of(measured))
            if kind.better < 0:
                panel.set_yscale("log")
            panel.set_ylabel(kind.label)
            panel.set_title(f"Protocol {protocol}: {finding(measured, kind)}", loc="left", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, metadata={"Software": None})


def _draw(panel: Axes, measured: Measured, value: Value, better: int) -> None:
    families = measured.families()
    for family in drawn(measured):
        _family(panel, measured, families[family], value, better, family)
    panel.set_xscale("log")
    panel.set_xlabel(f"bytes on the wire, mean of {measured.n} questions (log)")
    panel.grid(which="major", color="#eeeeee", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _family(
    panel: Axes, measured: Measured, points: list[Point], value: Value, better: int, family: str
) -> None:  # fmt: skip
    """Marks, line and intervals; a logarithmic axis has no place for a KL of nothing."""
    (colour, marker), style = look(family)
    found = {p: e for p in points if (e := value(p.name)) is not None and (better > 0 or e.mean > 0)}
    line = [p for p in edge(points, measured, value, better) if p in found]
    sizes = {p: measured.bytes[p.name] for p in points}
    panel.plot([sizes[p] for p in line], [found[p].mean for p in line], style, color=colour, linewidth=1.6, zorder=3,
               marker=marker, markersize=5, label=NAMES.get(family, family))  # fmt: skip
    rest = [p for p in found if p not in line]
    panel.plot([sizes[p] for p in rest], [found[p].mean for p in rest], marker, color=colour, markersize=3.5, alpha=0.5,
               linestyle="", zorder=2)  # fmt: skip
    for point, e in found.items():
        low = e.low if better > 0 else max(e.low, e.mean / 100)
        panel.plot([sizes[point]] * 2, [low, e.high], color=colour, alpha=0.35, linewidth=1.2, zorder=2)


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
        panel.axhline(y, color=QUIET, linewidth=0.8, linestyle=":", zorder=1)
        panel.text(1.005, y, text, fontsize=7.5, color=INK, va="center", transform=panel.get_yaxis_transform())
