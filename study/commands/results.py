"""``python -m study results``: RESULTS.md and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvferry.errors import InputError
from kvferry.evaluate.records import kind_of
from kvferry.evaluate.tables import CAVEAT
from study import (
    capsule,
    claims,
    codec_tables,
    evaluation_tables,
    headline,
    long_tables,
    method_tables,
    mode_tables,
    overview,
    perplexity,
    prune,
    scout_tables,
    sweep_tables,
    text_codecs,
    translate_tables,
)
from study.claims.base import Raw
from study.page import Places, write_detail
from study.squad import overview as squad

SECTIONS = {
    "headline": "The headline: fewest bytes at 98 % of the full cache's accuracy",
    "codecs": "How few bits: every codec",
    "capsule": "How few bits: a learned capsule",
    "selection": "Which tokens, how few bits: a first look",
    "scorers": "Which tokens: every scorer",
    "text": "Which tokens: the sources' scorers with all text kept",
    "policies": "Which tokens: modality policies at equal numbers of tokens",
    "construction": "Which tokens: hidden while the cache is built",
    "eval": "Answers and loyalty: kvferry eval",
    "scout": "Which tokens, by another model: mode scout on trial",
    "translate": "One model's cache for another: mode translate on trial",
    "prune": "Which tokens: dropped inside prefill",
    "points": "Every mode: bytes, quality, time",
    "turns": "Long runs: ten questions in turn",
    "drift": "Long runs: two hundred tokens on one cache",
    "pictures": "Long runs: several pictures in one prompt",
    "rare": "Long runs: what is seldom seen",
}
"""Title of a section by the first word of its raw file's name; the rest of the name says which model."""
WHERE = {"scout": "chosen by the {} model", "translate": "from the {} model", "points": "with the {} model on the edge"}
"""How a title goes on; "on the {} model" for the others."""
METHODS = ("scorers", "text", "policies", "construction")
"""Sections that compare methods at one codec; those of unknown kinds hold several of both."""
LONG_RUNS = ("turns", "drift", "pictures", "rare")
"""Sections whose raw files are those of ``python -m study long-runs``."""


def results(
    raw: Annotated[Path, typer.Option(help="Folder of raw results.")] = Path("study/results"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("RESULTS.md"),
    figures: Annotated[Path, typer.Option(help="Where its figures go.")] = Path("docs/figures"),
    details: Annotated[
        Path | None, typer.Option(help="Where the pages with every row go; results/ beside the figures.")
    ] = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="Leave the small models' pages of detail as they are.")
    ] = False,
) -> None:
    """Make RESULTS.md and its figures from the stored raw results."""
    files = sorted([*raw.glob("*.jsonl"), *raw.glob("points-*.json")], key=_section)
    if not files:
        raise InputError(f"no raw results in {raw}; `make results-full` makes them")
    places = Places(out, figures, details or figures.parent / "results")
    renders = dict.fromkeys(METHODS, method_tables.render) | dict.fromkeys(LONG_RUNS, long_tables.render)
    renders |= {"headline": headline.render, "codecs": codec_tables.render, "capsule": capsule.render}
    renders |= {"scout": scout_tables.render, "points": mode_tables.render, "translate": translate_tables.render}
    renders |= {"prune": prune.render}
    titles = []
    for file in files:
        kind, _, model = file.stem.partition("-")
        render = evaluation_tables.render if kind_of(file) == "evaluation" else renders.get(kind, sweep_tables.render)
        where = WHERE.get(kind, "on the {} model").format(model)
        titles.append(f"{SECTIONS[kind]}, {where}" if kind in SECTIONS else file.stem)
        if not brief:
            write_detail(file, places, render, titles[-1])
    found = Raw(raw)
    text = ["# Results", "", f"Made by `make results` from the raw files in `{raw}/`. {CAVEAT}", ""]
    text += [*overview.facts(found, places), ""]
    text += overview.headline_table(found, places) + overview.codec_table(found, places)
    text += [*overview.scorer_table(found, places), claims.render(raw, places)]
    behind = [(title, file.stem) for title, file in zip(titles, files, strict=True)]
    text += [*squad.section(raw / overview.REAL, places)]
    behind += squad.write_pages(raw / overview.REAL, places) + text_codecs.write_page(raw / overview.CODED, places)
    behind += perplexity.write_page(raw / overview.READ_ON, places)
    text += overview.pages(behind, places)
    out.write_text("\n".join(text))
    print(f"wrote {out} from {len(files)} file(s)")


def _section(file: Path) -> tuple[int, str]:
    """Known sections in their order, then the others by name."""
    kind = file.stem.partition("-")[0]
    return (list(SECTIONS).index(kind) if kind in SECTIONS else len(SECTIONS)), file.stem
