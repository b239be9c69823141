"""A simulation's figures: rows with intervals, a picture, and a page that holds both."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.errors import InputError
from kvferry.files import write_whole
from kvferry.link.trace import Array
from kvferry.palette import policy_look
from kvferry.policy.simulation.scenario import Outcome
from kvferry.statistics import Estimate, mean_interval, ratio_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html.j2")
GROUPS = 1000
"""More sessions than that are put together in groups before they are resampled."""


@dataclass(frozen=True)
class Row:
    """One way at one deadline. Intervals are over sessions: other starts on the same links, not other links.

    Parameters
    ----------
    on_time, rounds_on_time : Estimate
        Share of questions, and of moments at which all agents' questions were answered in time.
    of_possible : Estimate or None
        In time as a share of the questions that any point could have answered in time; None where there are none.
    quality : Estimate
        A late answer counts 0.
    of_oracle : Estimate or None
        That quality as a share of the oracle's, session by session; None where even the oracle's is 0.
    chosen : Estimate
        Quality of the chosen points, late or not.
    megabytes : Estimate
        Sent per question, probes included.
    modes : dict
        Share of questions by mode.
    """

    deadline: float
    way: str
    allocation: str
    on_time: Estimate
    rounds_on_time: Estimate
    of_possible: Estimate | None
    quality: Estimate
    of_oracle: Estimate | None
    chosen: Estimate
    megabytes: Estimate
    modes: Mapping[str, float]

    @property
    def name(self) -> str:
        """The way, with the allocation where there is one."""
        return f"{self.way}, {self.allocation}" if self.allocation else self.way

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)


def row(deadline: float, way: str, allocation: str, outcome: Outcome, oracle: Outcome) -> Row:
    """Figures of one outcome, beside the oracle's of the same scenario."""
    asked = _grouped(outcome.requests)
    quality = _grouped(outcome.quality) / asked
    possible = _grouped(outcome.possible) / asked
    total = sum(outcome.modes.values())
    return Row(
        deadline,
        way,
        allocation,
        on_time=mean_interval(_grouped(outcome.on_time) / asked),
        rounds_on_time=mean_interval(_grouped(outcome.rounds_on_time) / _grouped(outcome.rounds)),
        of_possible=ratio_interval(_grouped(outcome.on_time) / asked, possible) if possible.any() else None,
        quality=mean_interval(quality),
        of_oracle=ratio_interval(quality, _grouped(oracle.quality) / asked) if oracle.quality.any() else None,
        chosen=mean_interval(_grouped(outcome.chosen) / asked),
        megabytes=mean_interval(_grouped(outcome.nbytes) / asked / 1e6),
        modes={mode: count / total for mode, count in outcome.modes.most_common()},
    )


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Share in time and quality by deadline, and quality against bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    in_time, quality, cost = figure.subplots(1, 3)
    for name, mine in _by_name(rows):
        colour, marker = policy_look(name)
        style = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2, "linewidth": 1.3}
        if name.startswith("oracle"):
            style |= {"linestyle": "--"}
        deadlines = [x.deadline for x in mine]
        for axes, estimates in ((in_time, [x.on_time for x in mine]), (quality, [x.quality for x in mine])):
            axes.errorbar(deadlines, [x.mean for x in estimates], _margins(estimates), label=name, **style)
        cost.plot(
            [x.megabytes.mean for x in mine], [x.quality.mean for x in mine], color=style["color"],
            marker=style["marker"], markersize=5, linewidth=0.8,
        )  # fmt: skip
    for axes, label in ((in_time, "share answered in time"), (quality, "quality, a late answer counts 0")):
        axes.set(xlabel="deadline in s", ylabel=label, ylim=(-0.02, 1.05), xticks=sorted({x.deadline for x in rows}))
    cost.set(xlabel="MB sent per question", ylabel="quality, a late answer counts 0", ylim=(-0.02, 1.05))
    for axes in (in_time, quality, cost):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(*in_time.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(f"{finding(rows)}\n{title}", x=0.01, ha="left", fontsize=11)
    return figure


def finding(rows: Sequence[Row]) -> str:
    """The policy of the highest mean quality over the deadlines, beside the oracle where one was simulated."""
    means = {name: float(np.mean([x.quality.mean for x in mine])) for name, mine in _by_name(rows)}
    known = [name for name in means if not name.startswith("oracle")] or list(means)
    best = max(known, key=means.__getitem__)
    oracle = next((name for name in means if name.startswith("oracle")), None)
    text = f"{best} is worth most: mean quality {means[best]:.2f}"
    return text if oracle in (None, best) else f"{text}, the oracle {means[oracle or best]:.2f}"


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=110, format="png")
        write_whole(path, drawn.getvalue())
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from None


def write_html(rows: Sequence[Row], facts: Mapping[str, str], title: str, path: Path) -> None:
    """A page that needs nothing else: the picture, the table, and what was simulated.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawing = io.StringIO()
    draw(rows, title).savefig(drawing, format="svg", metadata={"Date": None})
    text = drawing.getvalue()
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=title, facts=facts, figure=text[text.index("<svg") :], names=COLUMNS, rows=[cells(x) for x in rows]
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from None


COLUMNS = ("deadline", "way", "in time %", "of possible", "rounds %", "quality", "% of oracle", "chosen", "MB", "modes")


def cells(row: Row) -> list[str]:
    """The row as text, under :data:`COLUMNS`."""
    return [
        f"{row.deadline:g} s",
        row.name,
        _interval(row.on_time, 100, 1),
        f"{100 * row.of_possible.mean:.2f}" if row.of_possible else "-",
        f"{100 * row.rounds_on_time.mean:.1f}",
        _interval(row.quality, 1, 3),
        f"{100 * row.of_oracle.mean:.1f}" if row.of_oracle else "-",
        f"{row.chosen.mean:.3f}",
        f"{row.megabytes.mean:.2f}",
        ", ".join(f"{mode.removeprefix('kv:')} {share:.0%}" for mode, share in row.modes.items() if share >= 0.01),
    ]


def _interval(estimate: Estimate, scale: float, digits: int) -> str:
    mean, low, high = (f"{scale * x:.{digits}f}" for x in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"


def _margins(estimates: Sequence[Estimate]) -> Array:
    """Below and above, ``[2, n]``; rounding may put a mean a hair outside."""
    margins = np.array([[x.mean - x.low for x in estimates], [x.high - x.mean for x in estimates]])
    clipped: Array = np.clip(margins, 0, None)
    return clipped


def _by_name(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for name in dict.fromkeys(x.name for x in rows):
        yield name, sorted((x for x in rows if x.name == name), key=lambda x: x.deadline)


def _grouped(sums: Array) -> Array:
    """Sums of neighbouring sessions, at most :data:`GROUPS` of them."""
    grouped: Array = np.add.reduceat(sums, np.linspace(0, len(sums), min(len(sums), GROUPS), False).astype(int))
    return grouped
