"""KVCapsule's claim on trial: the learned capsule at several sizes, its variants, and what else reaches those bytes.

A sweep like any other (:mod:`kvferry.evaluate.sweep`), with profiles that are made where they are not there yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvferry.codecs import Capsule
from kvferry.codecs.profile_store import FOLDERS
from kvferry.evaluate.measured import Measured, Point
from kvferry.evaluate.records import Line, read
from kvferry.evaluate.sweep import Sweep, run
from kvferry.evaluate.tables import PROTOCOLS, provenance_note, proxy_note
from study.codec_tables import BYTES, TESTS, Pair, comparison_table, rows_table
from study.page import Places

CLAIMED = 0.4
"""What KVCapsule leaves of the visual tokens' cache."""
SHARES = (0.6, CLAIMED, 0.2)
TEXT = 0.13
"""About so much of a prompt is text: a selection that keeps all of it and a share ``v`` of the visual tokens keeps
``v + (1 - v) * TEXT`` of all."""
OTHERS = {
    "keys only": "values=full", "values only": "keys=full", "both by networks": "values=mlp",
    "both by components": "keys=pca", "the other way round": "keys=pca,values=mlp", "nothing learned of keys":
    "keys=interpolated",
}  # fmt: skip
"""Variants, and the options that make them: asymmetry is the paper's claim."""
CAPSULES = (
    *(f"full|capsule:{share:g},codec=bf16" for share in SHARES),
    *(f"full|capsule:{share:g}" for share in SHARES),
    "full|capsule:0.2,codec=int4",
    "full|capsule:0.2,codec=int2",
)
VARIANTS = {name: f"full|capsule:{CLAIMED:g},codec=bf16,{options}" for name, options in OTHERS.items()}
EVICTED = {
    share: f"leaveout@{round(share + (1 - share) * TEXT, 2):g},modality=text_preserving|bf16" for share in SHARES
}
RIVALS = (
    *EVICTED.values(), EVICTED[CLAIMED].replace("leaveout", "random"), "full|svd:32", "full|svd:16", "full|svd:8",
    "full|transform:16", "full|transform:32", "full|transform:64",
)  # fmt: skip
RECIPES = ("full|bf16", "none|bf16", *CAPSULES, *VARIANTS.values(), *RIVALS)
PROMPTS, PASSES = 200, 8
"""Of calibration."""
DTYPE = "float32"
"""Of the models: several times as fast as bfloat16 on processors that multiply that slowly."""


def plan(model: str, n: int) -> Sweep:
    """The sweep of one model."""
    kinds = ("colour", "shape", "glyph", "word", "exist", "compare") if model.endswith("control") else ()
    return Sweep(model, RECIPES, n=n, check="forced", kinds=kinds, dtype=DTYPE)


def make_profile(model: str, folder: Path, said: Callable[[str], None]) -> Path:
    """The model's profile, all variants in it; one that is there is left as it is."""
    path = folder / f"{Path(model).name}.profile"
    if path.is_file():
        return path
    from kvferry.analyze.source import drawn_questions
    from kvferry.evaluate.sweep import provenance
    from kvferry.fit.capsule import Plan, fit_capsule
    from kvferry.fit.learn import Schedule
    from kvferry.models import load

    vlm = load(model, dtype=DTYPE)
    questions = drawn_questions("calibration", PROMPTS)
    facts: dict[str, Any] = provenance(vlm) | {"data": questions.label, "n": questions.total}
    folder.mkdir(parents=True, exist_ok=True)
    fit_capsule(
        vlm, questions.each(), Plan(variants=True, schedule=Schedule(PASSES)), facts, path,
        said=lambda name, history: said(f"{name}: held out {history.held_out[-1]:.4f}"),
    ).write(path)  # fmt: skip
    return path


def ask(model: str, n: int, out: Path, folder: Path, command: str) -> Iterator[Line]:
    """The questions that ``out`` does not hold yet."""
    before = os.environ.get(FOLDERS, "")
    os.environ[FOLDERS] = os.pathsep.join(filter(None, [str(folder), before]))
    yield from run(plan(model, n), out, command=command)


def pairs_of(measured: Measured) -> dict[str, list[Pair]]:
    """What is held against what: heading to pairs, of those rows that were measured."""
    points = measured.points
    main = f"full|capsule:{CLAIMED:g},codec=bf16"

    def pairs(rows: list[tuple[str, str, str]]) -> list[Pair]:
        return [(what, points[a], points[b]) for what, a, b in rows if a in points and b in points]

    evicted = [
        (what, f"full|capsule:{share:g},codec=bf16", row + label)
        for share, row in EVICTED.items()
        for label, what in (("", "as many tokens"), (" proxy", "as many, for a proxy question"))
    ]
    evicted.append(("as many at random", main, EVICTED[CLAIMED].replace("leaveout", "random")))
    capsules = [p for p in points.values() if isinstance(p.codec, Capsule) and p.codec.codec != "bf16"]
    small = [p for p in capsules if not _options(p)]
    found = {
        "Is it without loss?": pairs([("the whole cache", row, measured.full) for row in CAPSULES[:6]]),
        "Is asymmetry needed?": pairs([(name, main, row) for name, row in VARIANTS.items()]),
        "Against evicting": pairs(evicted),
        "Against other codecs, the row of nearest bytes": [
            ("", point, near)
            for point in measured.by_size(small)
            for kind in ("svd", "transform")
            if (near := measured.nearest(point.name, [p for p in points.values() if _is(p, kind)]))
        ],
    }
    return {heading: rows for heading, rows in found.items() if rows}


def _is(point: Point, codec: str) -> bool:
    return point.whole and point.codec is not None and point.codec.name == codec


def _options(point: Point) -> bool:
    codec = point.codec
    return isinstance(codec, Capsule) and (codec.keys, codec.values) != ("mlp", "pca")


def render(results: Path, places: Places, title: str) -> str:
    """The section of one raw file; writes the page with every row."""
    head, lines = read(results)
    page = places.detail(results)
    text = [f"## {title}", "", provenance_note(head, lines), ""]
    full = [f"# {title}", "", provenance_note(head, lines), ""]
    for protocol in PROTOCOLS:
        if not any(line.protocol == protocol for line in lines):
            continue
        measured = Measured(lines, protocol)
        name = f"Protocol {protocol}: {PROTOCOLS[protocol]}"
        note = [
            f"n = {measured.n} questions, paired. {BYTES}; the full cache in BF16 takes {measured.bf16:,.0f}. Profiles "
            "are not counted.", *proxy_note(measured.names), "",
        ]  # fmt: skip
        text += [f"### {name}", "", *note, rows_table(measured, _short(measured)), ""]
        full += [f"## {name}", "", *note, f"{TESTS}.", "", *_everything(measured)]
    text += [f"All rows and comparisons: [{page.name}]({places.link(page)})", ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(full))
    return "\n".join(text)


def _short(measured: Measured) -> list[Point]:
    """Ceiling, floor, and what the claim is about."""
    rows = {measured.full, measured.floor, *CAPSULES[:6], EVICTED[CLAIMED], f"{EVICTED[CLAIMED]} proxy"}
    return measured.by_size([point for name, point in measured.points.items() if name in rows])


def _everything(measured: Measured) -> Iterator[str]:
    yield from ("### Every row, largest first", "")
    yield rows_table(measured, measured.by_size(list(measured.points.values())))
    for heading, pairs in pairs_of(measured).items():
        yield from ("", f"### {heading}", "", comparison_table(measured, pairs))
    yield ""
