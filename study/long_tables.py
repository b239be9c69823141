"""Sections of RESULTS.md about long runs; see :mod:`study.long_runs`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.evaluate.measured import SAME
from kvferry.evaluate.tables import interval, markdown
from kvferry.statistics import Estimate, difference_interval, estimate_of, mean_interval, means_with_draws
from study.codec_tables import percent
from study.long_drift import BUCKETS
from study.long_rare import RARE, frequencies
from study.long_runs import FLOOR, FULL, Record, read
from study.page import Places

Floats = npt.NDArray[np.float64]

TESTS = (
    "Intervals are 95 %, by resampling {unit}, and paired where rows are set against each other; "
    '"no difference shown" where the interval holds 0'
)
DRAWN = 3000
"""Training questions whose scenes are counted."""


def words(difference: Estimate) -> str:
    """What an interval shows of right answers."""
    if difference.low <= 0 <= difference.high:
        return SAME
    return "more right" if difference.mean > 0 else "fewer right"


def row_name(recipe: str) -> str:
    """With its part in the table."""
    return f"`{recipe}`" + {FULL: " (ceiling)", FLOOR: " (floor: no visual token)"}.get(recipe, "")


def sizes(records: Sequence[Record], recipe: str, key: str | None = None) -> str:
    """Mean bytes that brought a cache there."""
    found = [(record["bytes"] if key is None else record["bytes"][key])[recipe] for record in records]
    return f"{np.mean(found):,.0f}"


def column(records: Sequence[Record], *keys: str) -> Floats:
    """What stands in every record under these keys, one below the other."""
    return np.array([reduce(getitem, keys, record) for record in records], np.float64)


def turns(recipes: Sequence[str], records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Ten questions in turn: what turns cost the full cache, then what compression costs on top."""
    ways = ("turns", "alone")
    right = {way: {r: column(records, way, r) for r in recipes} for way in ways}
    count = right["turns"][FULL].shape[1]
    in_turn, alone = right["turns"][FULL], right["alone"][FULL]
    rows = []
    for turn in range(count):
        difference = difference_interval(in_turn[:, turn], alone[:, turn])
        shares = [interval(mean_interval(x[:, turn])) for x in (alone, in_turn)]
        rows.append([str(turn + 1), *shares, percent(difference), words(difference)])
    later = difference_interval(in_turn[:, 1:].mean(1), alone[:, 1:].mean(1))
    text = [
        f"n = {len(records)} scenes with {count} questions each, {len(records) * count} in all, in an order drawn at "
        f"random. {TESTS.format(unit='scenes')}.",
        "",
        "The full cache first: each question in its turn, after the earlier ones and the model's own answers, against "
        f"the same question fresh. Turns 2 to {count}: {percent(later)} points ({words(later)}). The model was trained "
        "on single questions, so what its turns lose is not compression's doing.",
        "",
        markdown(["turn", "fresh", "in turn", "difference in points", ""], rows, left=(4,)),
        "",
        "Protocol A on the first turn: the cache was compressed for the first question, later ones were not known. "
        "Accuracy in turn:",
        "",
        _by_turn(recipes, right["turns"], count, records),
        "",
        "The same questions, each alone on the scene's cache that was compressed with the first question as its guide "
        "(protocol B; the first is its own guide, an oracle). Here the model does what it was trained for, so this is "
        "what later questions find in the cache:",
        "",
        _by_turn(recipes, right["alone"], count),
        "",
    ]
    details = []
    for way, name in (("turns", "In turn"), ("alone", "Alone on the cache compressed for the first question")):
        cells = [[row_name(r), *(interval(mean_interval(right[way][r][:, t])) for t in range(count))] for r in recipes]
        head = ["", *(f"turn {t + 1}" for t in range(count))]
        details += [f"## {name}: accuracy by turn", "", markdown(head, cells), ""]
    return text, details


def _by_turn(recipes: Sequence[str], right: dict[str, Floats], count: int, records: Sequence[Record] = ()) -> str:
    """Shares of right answers; with the records, the bytes that were sent as well."""
    rows = []
    for recipe in recipes:
        mine = right[recipe]
        cells = [row_name(recipe), *([sizes(records, recipe)] if records else [])]
        cells += [f"{mine[:, turn].mean():.2f}" for turn in range(count)]
        if recipe != FULL:
            difference = difference_interval(mine[:, 1:].mean(1), right[FULL][:, 1:].mean(1))
            cells += [percent(difference), words(difference)]
        rows.append(cells)
    head = ["sent", *(["bytes"] if records else []), *map(str, range(1, count + 1))]
    head += [f"turns 2 to {count} minus full: points", ""]
    return markdown(head, [row + [""] * (len(head) - len(row)) for row in rows], left=(len(head) - 1,))


def drift(recipes: Sequence[str], records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Agreement with the full cache, by position."""
    names = [f"{first + 1} to {last}" for first, last in BUCKETS]
    texts = {
        "answers": "Where the dialogue says an answer or ends one, all that the model was trained to predict",
        "dialogue": "Everywhere in the dialogue, its questions included, which no model can foresee",
        "free": "On the full cache's own greedy text, whose end tokens end nothing (no text that the model was trained "
        "on)",
    }
    text = [
        f"n = {len(records)} scenes. Every cache (protocol A for the first question) is made to read the same "
        f"{BUCKETS[-1][1]} tokens: questions about the scene with their true answers. Top-1 agreement with the full "
        "cache in percent, and KL(full || recipe) in nats, by position. "
        + TESTS.format(unit="scenes")
        + ". A model of "
        "three million parameters that answers in one to four tokens shows whether a difference grows or fades with "
        "distance, not how a large model would write.",
        "",
    ]
    details: list[str] = []
    for key, title in texts.items():
        found = {recipe: column(records, key, recipe) for recipe in recipes}
        agree, kl = [], []
        for recipe in recipes:
            if recipe == FULL:
                continue
            each = range(len(BUCKETS))
            agree.append([row_name(recipe), *(percent(mean_interval(found[recipe][:, b, 0])) for b in each)])
            change = difference_interval(found[recipe][:, -1, 0], found[recipe][:, 0, 0])
            agree[-1] += [percent(change), _change(change)]
            kl.append([row_name(recipe), *(interval(mean_interval(found[recipe][:, b, 1])) for b in each)])
        table = markdown(["agreement, %", *names, "last minus first: points", ""], agree, left=(len(names) + 2,))
        other = markdown(["KL, nats", *names], kl)
        text += [f"{title}:", "", table, ""]
        details += [f"## {title}", "", table, "", other, ""]
    return text, details


def _change(difference: Estimate) -> str:
    if difference.low <= 0 <= difference.high:
        return SAME
    return "agrees more later" if difference.mean > 0 else "agrees less later"


def pictures(recipes: Sequence[str], records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Two pictures, which the model was trained on, and three, which it was not."""
    text = [
        f"n = {len(records)} questions about the first or the second picture (protocol A). "
        f"{TESTS.format(unit='questions')}. *agrees*: every token of the answer and its end are the full cache's most "
        "likely ones. *kept*: of the visual tokens of the picture that is asked about, and of the others. Pictures "
        "stand before the text, as the model's template has them; text between pictures is not tested.",
        "",
    ]
    for count, what in (
        ("2", "Two pictures, as the model saw them in training"),
        ("3", "The same questions with a third picture behind, which the model was never trained on"),
    ):
        rows = []
        full = column(records, count, FULL, "right")
        for recipe in recipes:
            mine = {key: column(records, count, recipe, key) for key in ("right", "agree", "kl")}
            asked, others = kept_shares(records, count, recipe)
            more = difference_interval(asked, others)
            difference = difference_interval(mine["right"], full)
            against = ["", ""] if recipe == FULL else [percent(difference), words(difference)]
            rows.append([
                row_name(recipe), sizes(records, recipe, count), interval(mean_interval(mine["right"])), *against,
                f"{100 * mine['agree'].mean():.1f}", f"{mine['kl'].mean():.4f}",
                f"{100 * asked.mean():.1f}", f"{100 * others.mean():.1f}", percent(more),
            ])  # fmt: skip
        floor = column(records, count, FLOOR, "right")
        over = difference_interval(full, floor)
        head = ["sent", "bytes", "accuracy", "minus full: points", "", "agrees, %", "KL, nats"]
        head += ["kept of the asked, %", "of the others, %", "difference in points"]
        table = markdown(head, rows, left=(4,))
        text += [f"{what}. The full cache is {percent(over)} points above the floor.", "", table, ""]
    return text, []


def kept_shares(records: Sequence[Record], count: str, recipe: str) -> tuple[Floats, Floats]:
    """Of the tokens of the picture that is asked about, and of all others, a mean over pictures."""
    each = [(record[count][recipe]["kept"], record["picture"]) for record in records]
    asked = np.array([kept[picture] for kept, picture in each])
    others = np.array([(sum(kept) - kept[picture]) / (len(kept) - 1) for kept, picture in each])
    return asked, others


def rare(recipes: Sequence[str], records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Rare against common attributes, and things that are small or alike against those that stand out."""
    counted = frequencies(DRAWN)
    shares = []
    for name in ("colour", "shape"):
        common = [n for what, n in counted[name].items() if what not in RARE]
        seldom = {what: n for what, n in counted[name].items() if what in RARE}
        low, high = (f"{100 * n / DRAWN:.1f}" for n in (min(common), max(common)))
        told = ", ".join(f"{what} in {100 * n / DRAWN:.1f} %" for what, n in seldom.items())
        shares.append(f"every common {name} in {low} to {high} % of the scenes, {told}")
    for name, least in (("word", 0), ("glyph", 1)):
        found = [n for what, n in counted[name].items() if len(what) == 1 or not least]
        what = "digit or letter" if least else name
        shares.append(f"every {what} in {100 * min(found) / DRAWN:.1f} to {100 * max(found) / DRAWN:.1f} %")
    text = [
        f"Of the first {DRAWN:,} training questions: {'; '.join(shares)}. So there is no long tail but two attributes "
        f"({', '.join(sorted(RARE))}) that about one scene in a hundred shows; everything else is drawn evenly.",
        "",
        _split(recipes, {"rare": [x for x in records if x["rare"]], "common": [x for x in records if not x["rare"]]}),
        "",
    ]
    one = [record for record in records if record["level"] is not None]
    text += [
        "The same questions, those that one thing decides, by how it stands out in its scene:",
        "",
        _split(recipes, {"small": [x for x in one if x["level"] == 0], "large": [x for x in one if x["level"] == 2]}),
        "",
        _split(
            recipes,
            {"its colour shared": [x for x in one if x["alike"] > 1], "alone": [x for x in one if x["alike"] == 1]},
        ),
        "",
        f"Protocol A. {TESTS.format(unit='questions')}; the two groups of a table are other questions, of the same "
        "kinds in the first table only. A loss is the full cache's accuracy minus the recipe's.",
        "",
    ]
    return text, []


def _split(recipes: Sequence[str], groups: dict[str, list[Record]]) -> str:
    """Two groups side by side: accuracy, what each loses, and the difference of the losses."""
    name, other = groups
    rows = []
    for recipe in recipes:
        right = [column(group, "right", recipe) for group in groups.values()]
        full = [column(group, "right", FULL) for group in groups.values()]
        cells = [row_name(recipe), *(interval(mean_interval(x)) for x in right)]
        if recipe != FULL:
            lost = [means_with_draws(f - r) for f, r in zip(full, right, strict=True)]
            cells += [percent(estimate_of(x, len(group))) for x, group in zip(lost, groups.values(), strict=True)]
            more = estimate_of(lost[0] - lost[1], sum(map(len, groups.values())))
            shown = SAME if more.low <= 0 <= more.high else f"{name} loses {'more' if more.mean > 0 else 'less'}"
            cells += [percent(more), shown]
        rows.append(cells + [""] * (7 - len(cells)))
    head = ["sent", *(f"{what} (n = {len(group)})" for what, group in groups.items())]
    head += [f"loss, {name}: points", f"loss, {other}: points", "difference of losses", ""]
    return markdown(head, rows, left=(6,))


SECTIONS = {"turns": turns, "drift": drift, "pictures": pictures, "rare": rare}


def render(results: Path, places: Places, title: str) -> str:
    """The section of one raw file; writes a page beside it where there is more."""
    head, records = read(results)
    plan = head["plan"]
    text, details = SECTIONS[plan["study"]](plan["recipes"], records)
    note = _note(head)
    if details:
        page = places.detail(results)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("\n".join([f"# {title}", "", note, "", *details]))
        note += f" More: [{page.name}]({places.link(page)})."
    return "\n".join([f"## {title}", "", note, "", *text])


def _note(head: dict[str, Any]) -> str:
    return (
        f"`{head['command']}` on the `{head['plan']['split']}` split, at commit `{head['commit'][:12]}`, "
        f"torch {head['torch']}, transformers {head['transformers']}, {head['machine']}, model {head['model']} "
        f"(`{head['fingerprint'][:12]}`, {head['dtype']}). Nothing was chosen on these scenes."
    )
