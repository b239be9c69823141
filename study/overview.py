"""The first page of the results: the facts that matter, then a short table a question; everything else is linked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

from kvferry.evaluate.measured import KEPT, MODES, PICTURES, Measured
from kvferry.evaluate.records import Protocol
from kvferry.evaluate.tables import interval, markdown
from kvferry.policy.break_even import SHAPES, Machines, break_even_map
from kvferry.policy.break_even_figure import panels
from study import prune, text_codecs, translate_tables
from study.claims.base import Raw
from study.codec_tables import percent, times
from study.headline import chosen, first_of, tuned
from study.method_figures import scorer
from study.methods import SHARES, Methods
from study.page import Places
from study.squad import overview as real

FIRST = ("cloud", "edge", "control")
"""The shipped models come in this order, others behind them."""
REAL = "smollm2"
"""The folder of what a language model answered that others trained."""
CODED = "smollm2-codecs"
"""The folder of how small its caches get."""
READ_ON = "smollm2-perplexity"
"""The folder of what it foretells behind compressed caches."""
IDLE = 0.5
"""Load of a cloud that is at most half busy."""
NEAR = 8
"""Families of codecs that the short table shows."""


def facts(raw: Raw, places: Places) -> list[str]:
    """What a reader should take away, each line from raw files."""
    real_facts = *real.fact(raw.folder / REAL, places), *text_codecs.fact(raw.folder / CODED, places)
    trials = *translate_tables.fact(raw.folder, places), *prune.fact(raw.folder, places)
    return [*_bytes_fact(raw), *real_facts, *trials, *_large_fact()]


def _models(raw: Raw, kind: str) -> list[str]:
    """Those that have a raw file of this kind."""
    found = sorted(file.stem.partition("-")[2] for file in raw.folder.glob(f"{kind}-*.jsonl"))
    return sorted(found, key=lambda model: FIRST.index(model) if model in FIRST else len(FIRST))


def _headlines(raw: Raw) -> Iterator[tuple[str, Protocol, Measured, str]]:
    """Model, protocol, rows and the row that was chosen beforehand."""
    for model in _models(raw, "headline"):
        name = f"headline-{model}.jsonl"
        for protocol in sorted({line.protocol for line in raw.lines(name)}):
            measured = raw.measured(name, protocol)
            picked = chosen(measured, tuned(raw.folder, raw.heads[name]["fingerprint"], protocol))
            point = first_of(measured, picked)
            if point is not None:
                yield model, protocol, measured, point.name


def _bytes_fact(raw: Raw) -> Iterator[str]:
    for model, protocol, measured, row in _headlines(raw):
        if model != _models(raw, "headline")[0]:
            continue
        jpeg = measured.smallest_good([p for p in measured.points.values() if p.family == PICTURES])
        beside = "no JPEG measured keeps that"
        if jpeg is not None:
            ratio = measured.size_ratio(jpeg.name, row)
            beside = f"the smallest JPEG that keeps {KEPT:.0%} takes {interval(ratio, 1)} times as many"
        yield (
            f"* **Small shipped model, protocol {protocol} ({_WHEN[protocol]}): {measured.bytes[row]:,.0f} bytes a "
            f"question** hold {percent(measured.of_full(row))} % of the full cache's accuracy, "
            f"{times(measured.shrink(row).mean)} fewer than the BF16 cache; {beside}."
        )


_WHEN: dict[Protocol, str] = {"A": "ask, then ship", "B": "ship, then ask"}


def _large_fact() -> Iterator[str]:
    """By formula, on the machines that ``kvferry break-even`` assumes."""
    mbit, load = np.geomspace(1, 10_000, 241), 1 - 1 / np.geomspace(1, 100, 161)
    machines, shares = Machines(), []
    for panel in chain.from_iterable(panels(SHAPES, [1369], machines, None)):
        if not panel.held:
            points = panel.points(1369)
            best, _ = break_even_map(points, mbit, load, machines.rtt_seconds, frozenset())
            wins = np.isin(best, [i for i, p in enumerate(points) if p.mode.startswith("image")])
            shares.append(f"{panel.title.splitlines()[0]} {wins.mean():.0%} ({wins[load <= IDLE].mean():.0%})")
    yield (
        "* **For large models the picture mostly wins**: by formula, at published ratios and on assumed machines, the "
        "JPEG is the soonest answer on this share of the map of bandwidth (1 Mbit/s to 10 Gbit/s) and cloud load, in "
        f"brackets where the cloud is at most half busy: {', '.join(shares)} ([docs/policy.md](docs/policy.md))."
    )


def headline_table(raw: Raw, places: Places) -> list[str]:
    """Fewest bytes at :data:`KEPT`, a line a model and protocol."""
    rows = []
    for model, protocol, measured, row in _headlines(raw):
        jpeg = measured.smallest_good([p for p in measured.points.values() if p.family == PICTURES])
        floor = "" if measured.floor is None else percent(measured.of_full(measured.floor))
        ceiling = f"{measured.accuracy(measured.full).mean:.3f}"
        picture = "" if jpeg is None else f"{measured.bytes[jpeg.name]:,.0f}"
        cells = [f"{measured.bytes[row]:,.0f}", times(measured.shrink(row).mean), percent(measured.of_full(row))]
        page = _link(places, f"headline-{model}")
        rows.append([f"[{model}]({page})", protocol, f"`{row}`", *cells, picture, ceiling, floor])
    head = ["model", "protocol", "chosen on validation", "bytes", "smaller than BF16", "% of full [95 %]"]
    head += [f"smallest JPEG at {KEPT:.0%}", "ceiling: accuracy", "floor: % of full"]
    note = (
        "Test split, n = 1000, paired; all bytes of the bitstream; both ends hold a calibrated profile beforehand "
        "(its size is on the pages behind the links)."
    )
    return _section("Fewest bytes at 98 % of the full cache's accuracy", [note, "", markdown(head, rows, (1, 2))], rows)


def codec_table(raw: Raw, places: Places) -> list[str]:
    """The smallest measured row of each family that holds :data:`KEPT`."""
    found: dict[str, dict[str, str]] = {}
    order: dict[str, float] = {}
    models = _models(raw, "codecs")
    for model in models:
        measured = raw.measured(f"codecs-{model}.jsonl")
        for family, points in measured.families().items():
            best = measured.smallest_good(points)
            if best is not None:
                size = measured.bytes[best.name]
                smaller = times(measured.shrink(best.name).mean)
                found.setdefault(family, {})[model] = f"`{best.name}`: {size:,.0f} ({smaller})"
                order.setdefault(family, size)
    names = sorted(found, key=order.__getitem__)
    shown = [*names[:NEAR], *(n for n in names[NEAR:] if n in (*MODES.values(), "full|intB"))]
    rows = [[f"`{n}`" if "|" in n else n, *(found[n].get(m, "none measured") for m in models)] for n in shown]
    links = ", ".join(f"[every row, {m}]({_link(places, f'codecs-{m}')})" for m in models)
    figure = places.link(places.figures / f"codecs-{models[0]}.png") if models else ""
    note = f"Protocol A, n = 1000. The smallest row of a family that holds {KEPT:.0%}: bytes (times smaller than BF16)."
    body = [f"![bytes against accuracy, by codec]({figure})", "", note, f"All, with ceiling and floor: {links}.", ""]
    return _section("How few bits", [*body, markdown(["family", *models], rows, range(1, 1 + len(models)))], rows)


def scorer_table(raw: Raw, places: Places) -> list[str]:
    """What each scorer needs for the first of :data:`SHARES`, in its plain form."""
    columns: dict[str, dict[str, str]] = {}
    links = []
    models = _models(raw, "scorers")
    for model in models:
        name = f"scorers-{model}.jsonl"
        links.append(f"[{model}]({_link(places, f'scorers-{model}')})")
        for protocol in sorted({line.protocol for line in raw.lines(name)}):
            columns[f"{model}, {protocol}"] = _needs(raw.methods(name, protocol))
    order = list(dict.fromkeys(chain.from_iterable(columns.values())))
    rows = [[f"`{n}`", *(by.get(n, "") for by in columns.values())] for n in order]
    figure = places.link(places.figures / f"scorers-{models[0]}.png") if models else ""
    note = (
        f"Kilobytes (BF16) for {SHARES[0]:.0%} of the full cache's accuracy, 95 % intervals, n = 1000; under protocol "
        f"B query-aware scorers use a proxy question. Every budget, share and kind of question, ceiling and floor: "
        f"{', '.join(links)}; policies, all text kept, and selection while the cache is built: below."
    )
    body = [f"![accuracy against bytes, by scorer]({figure})", "", note, ""]
    return _section("Which tokens", [*body, markdown(["scorer", *columns], rows)], rows)


def _needs(answers: Methods) -> dict[str, str]:
    found: dict[str, str] = {}
    full = answers.bytes[answers.full]
    for method in sorted(answers.methods, key=lambda m: float(answers.needed(m, SHARES[0])[0])):
        if method.deployable and method.base == method.plain:
            need = answers.estimate(answers.needed(method, SHARES[0]))
            text = f"{need.mean / 1e3:.0f} [{need.low / 1e3:.0f}, {need.high / 1e3:.0f}]"
            found.setdefault(scorer(method), text if need.mean < 0.999 * full else "no less than full")
    return found


def pages(found: Sequence[tuple[str, str]], places: Places) -> list[str]:
    """Every page of detail, by title and name."""
    lines = [f"* [{title}]({_link(places, stem)})" for title, stem in found]
    note = "Ceilings, floors, kinds of question, commands, commits and machines are there."
    return ["## Every table", "", note, "", *lines, ""]


def _section(title: str, body: Iterable[str], rows: Sequence[object]) -> list[str]:
    """A heading with what belongs under it; nothing where no raw file holds it."""
    return [f"## {title}", "", *body, ""] if rows else []


def _link(places: Places, stem: str) -> str:
    return places.link(places.details / f"{stem}.md")
