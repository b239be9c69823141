"""Figures as SVG that takes its ink from the page, so that light and dark both read."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from kvferry.analyze.harm import HarmResult
from kvferry.analyze.mass import MassResult
from kvferry.analyze.observe import DROPS, FRACTIONS
from kvferry.analyze.overlap import OverlapResult
from kvferry.analyze.rank import KINDS, RankResult
from kvferry.analyze.running import Array
from kvferry.analyze.sparsity import SparsityResult
from kvferry.analyze.survivors import SurvivorsResult
from kvferry.analyze.tail import SHARES, TailResult
from kvferry.analyze.watch import POST_VISION, QUESTION, VISUAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour in a figure."""
SEEN, SAID, THIRD, GREY = "#3f8ee8", "#e8853f", "#3fae6b", "#8a8a8a"
"""Visual, text, a third series, and what is only there for comparison."""
SHADES = ("#b9a7f0", "#8f7ae0", "#6a54c4")
"""Of the kept shares."""
WIDTH = 12.5
"""Inches that fit side by side before the page makes letters too small to read."""
LEAST = 1e-5
"""Where the axis of divergences begins, in nats."""


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    look = {
        **dict.fromkeys(inked, INK),
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.fonttype": "none",
        "svg.hashsalt": "kvferry",
    }
    with rc_context(look):
        yield


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element without a background, drawn in the page's text colour."""
    text = io.StringIO()
    with _style():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    body = text.getvalue()
    before, _, rest = body[body.index("<svg") :].partition("<metadata>")
    return (before + rest.partition("</metadata>")[2]).replace(INK, "currentColor")


def _panels(rows: int, columns: int, height: float = 2.7, width: float = 3.5) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def _line(axes: Axes, values: Array, margin: Array | None, label: str, colour: str, style: str = "-") -> None:
    """One series by layer with its 95 % band; nothing where nothing was measured."""
    if np.isnan(values).all():
        return
    layers = np.arange(len(values))
    axes.plot(layers, values, style, color=colour, label=label, marker="o", markersize=3)
    if margin is not None:
        axes.fill_between(layers, values - margin, values + margin, color=colour, alpha=0.2, linewidth=0)


def _by_layer(axes: Axes, title: str, *, unit: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.05 if unit else None)
    axes.legend()


def rank_figure(rank: RankResult) -> Figure:
    """Effective rank by layer: per prompt above, pooled over prompts below."""
    with _style():
        figure, panels = _panels(2, len(KINDS))
        for kind, name in enumerate(KINDS):
            above, below = panels[kind], panels[len(KINDS) + kind]
            for modality, (label, colour) in enumerate((("visual", SEEN), ("text", SAID))):
                _line(above, rank.mean[0, :, kind, modality], rank.margin[0, :, kind, modality], label, colour)
                _line(below, rank.pooled[0, :, kind, modality], None, label, colour, "--")
            _by_layer(above, f"{name}, per prompt ({rank.tokens:.0f} tokens)")
            _by_layer(below, f"{name}, pooled ({rank.pooled_tokens} tokens)")
        panels[0].set_ylabel("effective rank")
        panels[len(KINDS)].set_ylabel("effective rank")
    return figure


def attention_figure(sparsity: SparsityResult, mass: MassResult) -> Figure:
    """Sparsity, mass and entropy by layer."""
    with _style():
        figure, (sparse, heavy, broad) = _panels(1, 3, height=3.0)
        for group, column, label, colour in (
            (POST_VISION, 0, "after the picture → visual", SEEN),
            (POST_VISION, 1, "after the picture → text", SAID),
            (VISUAL, 0, "visual → visual", THIRD),
        ):
            _line(sparse, sparsity.mean[:, group, column], sparsity.margin[:, group, column], label, colour)
        for group, column, label, colour in (
            (QUESTION, 0, "question → visual", SEEN),
            (QUESTION, 1, "question → text", SAID),
            (VISUAL, 0, "visual → visual", THIRD),
        ):
            _line(heavy, mass.mean[:, group, column], mass.margin[:, group, column], label, colour)
        if mass.even[QUESTION] > 0:
            heavy.axhline(mass.even[QUESTION], color=GREY, linestyle=":", label="question → visual, if even")
        for group, label, colour in ((QUESTION, "question", SAID), (VISUAL, "visual", SEEN)):
            _line(broad, mass.entropy[:, group], mass.entropy_margin[:, group], label, colour)
        _by_layer(sparse, "share below the threshold", unit=True)
        _by_layer(heavy, "attention mass", unit=True)
        _by_layer(broad, "entropy (1 = even)", unit=True)
    return figure


def tail_figure(tail: TailResult) -> Figure:
    """Long-tail curves beside the diagonal of even attention."""
    with _style():
        figure, (whole, layered) = _panels(1, 2, height=3.6, width=4.4)
        for curves, label, colour in ((tail.visual, "visual tokens", SEEN), (tail.text, "text tokens", SAID)):
            whole.plot(100 * SHARES, 100 * curves.mean(0), color=colour, label=label, linewidth=2)
        whole.set_title("mean over layers")
        shades = np.linspace(0.4, 1.0, len(tail.visual))
        for layer, (curve, margin, shade) in enumerate(zip(tail.visual, tail.visual_margin, shades, strict=True)):
            ends = layer in (0, len(shades) - 1)
            layered.plot(100 * SHARES, 100 * curve, color=SEEN, alpha=shade, label=f"layer {layer}" if ends else None)
            low, high = 100 * (curve - margin), 100 * (curve + margin)
            layered.fill_between(100 * SHARES, low, high, color=SEEN, alpha=0.15, linewidth=0)
        layered.set_title("visual tokens, layer by layer")
        for axes in (whole, layered):
            axes.plot([0, 100], [0, 100], ":", color=GREY, label="even attention")
            axes.set_xlabel("top x % of the tokens")
            axes.set_ylabel("% of the attention on them")
            axes.legend(loc="lower right")
    return figure


def harm_figure(harm: HarmResult) -> Figure:
    """What dropping does to the next token."""
    with _style():
        figure, (lost, same) = _panels(1, 2, height=2.6, width=4.8)
        names = [f"{name}: {share:.0%} kept" for name, share in DROPS]
        colours = [SEEN if name == "visual" else SAID for name, _ in DROPS]
        bars = lost.barh(names, np.maximum(harm.divergence, 1.01 * LEAST), color=colours)
        lost.bar_label(bars, [f"{x:.2g}" for x in harm.divergence], padding=4)
        lost.set_xscale("log")
        lost.set_xlim(left=LEAST)
        lost.set_title("KL to the full cache's next token, nats (log)")
        bars = same.barh(names, 100 * harm.unchanged, color=colours)
        same.bar_label(bars, fmt="%.0f", padding=4)
        same.set_title("first token unchanged, % of prompts")
        same.tick_params(labelleft=False)
        for axes in (lost, same):
            axes.invert_yaxis()
            axes.margins(x=0.15)
    return figure


def _heat(axes: Axes, values: Array, rows: Sequence[str], title: str, low: float = 0.0) -> None:
    axes.imshow(values, vmin=low, vmax=1.0, cmap="viridis", aspect="equal")
    axes.set_title(title)
    axes.set_xticks(range(len(rows)), rows, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    if len(rows) > 12:
        return
    for (i, j), value in np.ndenumerate(values):
        ink = "white" if (value - low) / (1 - low) < 0.6 else "black"
        axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=7)


def scorers_figure(overlap: OverlapResult) -> Figure:
    """Overlap of kept sets between scorers, one square per kept share."""
    size = 1.6 + 0.42 * len(overlap.scorers)
    columns = min(len(FRACTIONS), max(1, int(WIDTH / size)))
    with _style():
        figure, panels = _panels(-(-len(FRACTIONS) // columns), columns, height=size + 0.3, width=size)
        for axes, fraction, values in zip(panels, FRACTIONS, overlap.between_scorers[0], strict=False):
            _heat(axes, values, overlap.scorers, f"{fraction:.0%} kept")
        for axes in panels[len(FRACTIONS) :]:
            axes.set_visible(False)
    return figure


def layers_figure(overlap: OverlapResult) -> Figure:
    """Overlap of kept sets between layers at half the tokens, for scorers that do not rank once for all layers."""
    values = overlap.between_layers[0, FRACTIONS.index(0.5)]
    own = [i for i, x in enumerate(values) if x.min() < 1 - 1e-9] or [0]
    names = [str(x) for x in range(values.shape[-1])]
    size = max(2.4, 1.2 + 0.28 * min(len(names), 12))
    with _style():
        figure, panels = _panels(-(-len(own) // 4), min(len(own), 4), height=size, width=size)
        for axes, index in zip(panels, own, strict=False):
            _heat(axes, values[index], names, overlap.scorers[index])
            axes.tick_params(axis="x", labelrotation=0)
            if len(names) > 12:
                axes.set_xticks([])
                axes.set_yticks([])
        for axes in panels[len(own) :]:
            axes.set_visible(False)
    return figure


def models_figure(overlap: OverlapResult) -> Figure:
    """Overlap and Jaccard of two models' kept sets."""
    panels = [(name, overlap.between_models[i]) for i, name in enumerate(("overlap", "Jaccard"))]
    return _bars(panels, overlap.scorers)


def kept_figure(survivors: SurvivorsResult) -> Figure:
    """Share of visual and of text tokens that stay."""
    panels = [(f"{name} tokens that stay", survivors.kept[..., i].T) for i, name in enumerate(("visual", "text"))]
    figure = _bars(panels, survivors.scorers)
    for axes in figure.axes:
        for fraction, colour in zip(FRACTIONS, SHADES, strict=True):
            axes.axhline(100 * fraction, color=colour, linestyle=":", linewidth=0.8)
    return figure


def _bars(panels_of: Sequence[tuple[str, Array]], scorers: Sequence[str]) -> Figure:
    """``[fractions, scorers]`` as groups of bars, one panel each, side by side where they fit."""
    wide = max(4.4, 0.95 * len(scorers))
    columns = min(len(panels_of), max(1, int(WIDTH / wide)))
    with _style():
        figure, panels = _panels(-(-len(panels_of) // columns), columns, height=2.7, width=wide)
        places = np.arange(len(scorers))
        width = 0.8 / len(FRACTIONS)
        for axes, (title, values) in zip(panels, panels_of, strict=True):
            for i, (fraction, row, colour) in enumerate(zip(FRACTIONS, values, SHADES, strict=True)):
                bars = axes.bar(places + (i - 1) * width, 100 * row, width, color=colour, label=f"{fraction:.0%} kept")
                axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
            axes.set_xticks(places, [x.replace("_", "\n") for x in scorers])
            axes.set_ylim(0, 118)
            axes.set_title(f"{title}, %")
        panels[0].legend(ncols=3, loc="upper left")
    return figure
