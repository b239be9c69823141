"""The analysis as one HTML file that needs nothing else: words first, then figures."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kvferry.analyze import figures
from kvferry.analyze.observe import FRACTIONS
from kvferry.analyze.rank import KINDS, STATS
from kvferry.analyze.run import Analysis
from kvferry.analyze.running import mean_over
from kvferry.analyze.survivors import DRAWN_FRACTION
from kvferry.analyze.verdicts import agreement, interval_text
from kvferry.analyze.watch import COLUMNS
from kvferry.errors import InputError
from kvferry.files import write_whole
from kvferry.overlay import jpeg_bytes, lit_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Section:
    """A heading, what the figure means, and the figure; ``alt`` says in words what it shows.

    ``rows`` is a table below it, its head first.
    """

    title: str
    words: str
    figure: Figure
    alt: str
    rows: tuple[tuple[str, ...], ...] = ()
    note: str = ""


def write_html(analysis: Analysis, path: Path) -> None:
    """Write the report.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    try:
        write_whole(path, render(analysis))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place for the report") from None


def render(analysis: Analysis) -> str:
    """The report as HTML, self-contained: styles, SVG figures and JPEG pictures are in it, scripts are not."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        analysis=analysis,
        interval_text=interval_text,
        sections=[(x, figures.svg(x.figure)) for x in sections(analysis)],
        pictures=list(_pictures(analysis)),
        drawn_fraction=DRAWN_FRACTION,
    )


def sections(analysis: Analysis) -> list[Section]:
    """The figures that this analysis has something to show for."""
    pictured = analysis.prompts.with_pictures > 0
    return [
        *_inside(analysis),
        *(_pictured(analysis) if pictured else []),
        *_agreements(analysis),
        *([_what_stays(analysis)] if pictured else []),
    ]


def _inside(analysis: Analysis) -> list[Section]:
    return [
        Section(
            "How many directions keys and values use",
            "Effective rank: the exponential of the entropy of the normalised singular values, heads side by side. "
            "Equally many tokens of each modality, drawn at random, because a rank grows with the number of tokens. "
            "Above: within a prompt, which is what the claim is about. Below: over tokens of many prompts, which is "
            "what one basis for all of them would need. Bands are 95 % intervals.",
            figures.rank_figure(analysis.rank),
            "Effective rank of keys, un-rotated keys and values by layer",
            energy_rows(analysis),
            '"90 %" is the least number of singular values that hold 90 % of the energy, and so on.',
        ),
        Section(
            "Where attention goes, and how thinly",
            "Left: share of visible entries under 1 % of their row's largest. Middle: share of a row's attention by "
            "modality of the key. Right: entropy of a row over the logarithm of the number of keys it sees.",
            figures.attention_figure(analysis.sparsity, analysis.mass),
            "Threshold sparsity, attention mass and entropy by layer",
        ),
    ]


def _pictured(analysis: Analysis) -> list[Section]:
    return [
        Section(
            "The long tail",
            "Tokens in falling order of the question's attention: how much of it the first x % hold. On the dotted "
            "diagonal all tokens would matter alike.",
            figures.tail_figure(analysis.tail),
            "Long-tail curves of attention on visual and text tokens",
        ),
        Section(
            "What dropping costs",
            "After prefill, the less attended tokens of one modality are dropped and the last prompt token is fed "
            "again. What the question has already taken from the picture stays with it.",
            figures.harm_figure(analysis.harm),
            "Divergence of the next token after dropping visual or text tokens",
        ),
    ]


def _agreements(analysis: Analysis) -> list[Section]:
    found = [
        Section(
            "Do scorers agree?",
            "Overlap |A∩B|/k of the tokens two scorers keep in the same layer and head, in %. random shows what chance "
            "gives. (Jaccard is in --json.)",
            figures.scorers_figure(analysis.overlap),
            "Overlap of kept sets between scorers",
        ),
        Section(
            "Do layers agree?",
            "Overlap at half the tokens between the heads of two layers, in %; on the diagonal between all heads of "
            "one. Scorers with one ranking for all layers are left out.",
            figures.layers_figure(analysis.overlap),
            "Overlap of kept sets between layers",
        ),
    ]
    if analysis.against is not None:
        budgets = [f"{x:.0%} kept" for x in FRACTIONS]
        shares = [(name, "", *map(interval_text, row)) for name, row in agreement(analysis.overlap)]
        found.append(
            Section(
                f"Does {analysis.against} keep the same?",
                "Over all pairs of a layer and head here and one there. random shows what chance gives.",
                figures.models_figure(analysis.overlap),
                "Overlap and Jaccard of two models' kept sets",
                (("overlap [95 %]", "", *budgets), *shares),
            )
        )
    return found


def _what_stays(analysis: Analysis) -> Section:
    return Section(
        "What stays",
        "Share of each modality's tokens that stay, by scorer. Dotted: the share that was asked for.",
        figures.kept_figure(analysis.survivors),
        "Share of visual and text tokens that stay",
    )


def energy_rows(analysis: Analysis) -> tuple[tuple[str, ...], ...]:
    """Per kind and modality: effective and energy ranks per prompt, means over layers."""
    mean = mean_over(analysis.rank.mean, axis=1)
    rows = [
        (kind, modality, *(f"{x:.1f}" for x in mean[:, i, j]))
        for i, kind in enumerate(KINDS)
        for j, modality in enumerate(COLUMNS)
        if not np.isnan(mean[0, i, j])
    ]
    return (("per prompt, mean over layers", "", *STATS), *rows)


def _pictures(analysis: Analysis) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Question, then per panel its name and JPEG as base64: the picture itself, then what each scorer keeps."""
    for drawn in analysis.survivors.drawn:
        shares = {"the picture": np.ones((1, 1)), **drawn.shares}
        panels = []
        for name, share in shares.items():
            pixels = (255 * lit_pixels(drawn.picture, share.astype(np.float32))).round().astype(np.uint8)
            title = name if name == "the picture" else f"{name}: {share.mean():.0%} of it"
            panels.append((title, base64.b64encode(jpeg_bytes(Image.fromarray(pixels))).decode()))
        yield drawn.question, panels
