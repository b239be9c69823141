"""Sections of RESULTS.md that compare ways of selecting tokens, and a page with everything beside each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from kvferry.evaluate.records import Protocol, read
from kvferry.evaluate.tables import (
    FEW,
    PROTOCOLS,
    chose_little,
    few_note,
    interval,
    markdown,
    provenance_note,
    proxy_note,
)
from kvferry.selection.modality import Uniform
from kvferry.statistics import Estimate
from study.method_figures import draw_methods
from study.methods import SHARES, Method, Methods
from study.page import Places

KIND_FRACTION = 0.1
"""The fraction at which accuracy is broken down by kind of question."""
SAME = "no difference shown"

_APPLIED = {
    "post_hoc": "",
    "construction": " Dropped tokens were hidden while the cache was built, so that what is kept never saw them; "
    "nothing here was evicted afterwards.",
}


def verdict(ratio: Estimate) -> str:
    """What a ratio of bytes and its interval, as tables print them, show: under half a percent counts as nothing."""
    if round(ratio.low, 2) > 1:
        return "more bytes"
    return "fewer bytes" if round(ratio.high, 2) < 1 else SAME


def deciding_table(answers: Methods) -> str:
    """Best modality-aware against best modality-agnostic method: bytes for every share, and their ratio.

    Where scorers of kvferry's own take part, a second time without them.
    """
    rows = []
    own = not all(m.published for m in answers.methods)
    for published, share in product((False, True) if own else (False,), SHARES):
        aware, agnostic = (answers.best(sort, share, published=published) for sort in (True, False))
        if aware is None or agnostic is None:
            return "All methods here are of one sort, so there is nothing to set them against."
        ratio = answers.estimate(aware[1] / agnostic[1])
        cells = [x for method, draws in (aware, agnostic) for x in (f"`{method.name}`", _bytes(answers, draws))]
        among = ", published scorers" if published else ""
        rows.append([f"{share:.0%}{among}", *cells, interval(ratio, 2), f"aware: {verdict(ratio)}"])
    head = ["of full", "best modality-aware", "bytes", "best modality-agnostic", "bytes", "aware / agnostic", ""]
    return markdown(head, rows, left=(1, 3, 6))


def additions(answers: Methods) -> list[tuple[Method, Method, list[Estimate]]]:
    """Every deployable method with a budget or policy, its plain scorer, and for each share the ratio of bytes."""
    found = []
    for method in answers.methods:
        plain = answers.plain_of(method)
        if plain is not None and method.deployable:
            draws = [answers.needed(method, share) / answers.needed(plain, share) for share in SHARES]
            found.append((method, plain, [answers.estimate(x) for x in draws]))
    return found


def additions_note(answers: Methods) -> list[str]:
    """How often a budget or policy helps the scorer it is added to, in one sentence per budget or policy."""
    counts: dict[str, Counter[str]] = {}
    for method, plain, ratios in additions(answers):
        counts.setdefault(method.base.removeprefix(plain.base).lstrip(","), Counter())[verdict(ratios[0])] += 1
    if not counts:
        return []
    text = [f"The same scorer with and without, {SHARES[0]:.0%} of full:", ""]
    for what, count in sorted(counts.items()):
        parts = (f"{x} with {count[x]}" for x in ("fewer bytes", SAME, "more bytes"))
        text.append(f"* `{what}`, added to {count.total()} scorers: {', '.join(parts)}.")
    return [*text, ""]


def additions_table(answers: Methods) -> str:
    """A budget or policy against the same scorer without: the ratio of bytes needed, paired."""
    rows = [
        [f"`{method.name}`", f"`{plain.name}`", *(x for r in ratios for x in (interval(r, 2), verdict(r)))]
        for method, plain, ratios in additions(answers)
    ]
    heads = [x for share in SHARES for x in (f"bytes for {share:.0%}", "")]
    return markdown(["method", "against", *heads], rows, left=(1, 3, 5))


def needed_table(answers: Methods) -> str:
    """All methods by the bytes they need, beside the best modality-agnostic one."""
    references = [answers.best(False, share) for share in SHARES]
    rows = []
    for method in answers.ranked():
        cells = [f"`{method.name}`", "aware" if method.aware else "agnostic"]
        for share, reference in zip(SHARES, references, strict=True):
            draws = answers.needed(method, share)
            cells.append(_bytes(answers, draws))
            cells.append("" if reference is None else interval(answers.estimate(draws / reference[1]), 2))
        rows.append(cells)
    heads = [x for s in SHARES for x in (f"bytes for {s:.0%} of full", "to the best agnostic")]
    return markdown(["method", "modality", *heads], rows, left=(1,))


def fraction_table(answers: Methods, methods: Sequence[Method]) -> str:
    """Methods down, fractions across: accuracy with its interval, between ceiling and floor."""
    fractions = sorted({f for m in answers.methods for f in m.fractions}, reverse=True)
    rows = [["**full** (ceiling)", "", interval(answers.accuracy(answers.full)), *[""] * (len(fractions) - 1)]]
    for method in methods:
        points = dict(zip(method.fractions, method.rows, strict=True))
        cells = [_accuracy(answers, points[f]) if f in points else "" for f in fractions]
        rows.append([f"`{method.name}`", "aware" if method.aware else "agnostic", *cells])
    if answers.floor is not None:
        floor = interval(answers.accuracy(answers.floor))
        rows.append(["**none** (floor: no visual token)", "", floor, *[""] * (len(fractions) - 1)])
    return markdown(["method", "modality", *(f"{f:.0%}" for f in fractions)], rows, left=(1,))


def _accuracy(answers: Methods, row: str) -> str:
    """With its interval, and marked where the scorer chose little."""
    mark = f" {FEW}" if chose_little(answers.scored(row)) else ""
    return interval(answers.accuracy(row)) + mark


def kinds_table(answers: Methods, methods: Sequence[Method], cell: Callable[[Method, _Kind], str]) -> str:
    """Methods down, kinds of question across."""
    kinds = [_Kind(answers, kind) for kind in answers.kinds()]
    rows = [[f"`{method.name}`", *(cell(method, kind) for kind in kinds)] for method in methods]
    return markdown(["method", *(f"{x.name} ({x.n})" for x in kinds)], rows)


class _Kind:
    """Questions of one kind."""

    def __init__(self, answers: Methods, name: str) -> None:
        self.name, self._answers = name, answers
        self.n, self._means = answers.of_kind(name)

    def holds(self, method: Method) -> str:
        """The smallest kept share down to which no loss to the full cache is shown."""
        last = "-"
        for fraction, row in zip(method.fractions, method.rows, strict=True):
            loss = self._means[row] - self._means[self._answers.full]
            if np.percentile(loss[1:], 97.5) < 0:
                break
            last = f"{fraction:.0%}"
        return last

    def accuracy(self, method: Method) -> str:
        """At :data:`KIND_FRACTION`."""
        if KIND_FRACTION not in method.fractions:
            return ""
        return f"{self._means[method.rows[method.fractions.index(KIND_FRACTION)]][0]:.2f}"


def _bytes(answers: Methods, draws: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    a = answers.estimate(draws)
    return f"{a.mean:,.0f} [{a.low:,.0f}, {a.high:,.0f}] ({answers.bf16 / a.mean:.1f}x)"


def render(results: Path, places: Places, title: str) -> str:
    """One section of RESULTS.md from one raw file; writes its figure, and the page with all methods."""
    head, lines = read(results)
    tables = {p: Methods(lines, p) for p in PROTOCOLS if any(x.protocol == p for x in lines)}
    figure, page = places.figure(results), places.detail(results)
    draw_methods(figure, tables)
    note = provenance_note(head, lines) + _APPLIED[head["sweep"].get("apply", "post_hoc")]
    text = [f"## {title}", "", note, "", f"![accuracy against bytes]({places.link(figure)})", ""]
    full = [f"# {title}", "", note, ""]
    for protocol, answers in tables.items():
        name = f"Protocol {protocol}: {PROTOCOLS[protocol]}"
        text += [f"### {name}", "", *_section(answers, protocol)]
        text += [f"All methods: [{page.name}]({places.link(page)})", ""]
        full += [f"## {name}", "", *_everything(answers)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(full))
    return "\n".join(text)


def _section(answers: Methods, protocol: Protocol) -> Iterable[str]:
    """What decides, then the strongest methods by fraction and by kind of question."""
    strong = answers.strongest()
    shown = [*strong, *(m for m in answers.methods if m.base == "random" and m not in strong)]
    best = "the best of its sort is chosen anew in every draw; " + ("oracle rows take no part; " * (protocol == "B"))
    return [
        f"n = {answers.n} questions, the same for every row (paired). Bytes of whole bitstreams (codec "
        f"`{answers.full.partition('|')[2]}`) at which a share of the ceiling's accuracy is reached, interpolated "
        f"between measured points, with 95 % intervals over questions ({best}x: smaller than the BF16 cache of "
        f"{answers.bf16:,.0f} bytes). The sources expect a ratio of 0.5 to 0.7.",
        *proxy_note(answers.names),
        *_room_note(answers),
        "",
        deciding_table(answers),
        "",
        *additions_note(answers),
        "Accuracy by kept share of tokens:",
        "",
        fraction_table(answers, shown),
        *few_note([answers.scored(row) for method in shown for row in method.rows]),
        "",
        "Where each breaks: the smallest kept share down to which no loss to the full cache is shown, by kind of "
        "question (and how many were asked); - where there is loss at every share measured.",
        "",
        kinds_table(answers, shown, lambda method, kind: kind.holds(method)),
        "",
    ]


def _room_note(answers: Methods) -> list[str]:
    """What happens below the size of what a policy must keep."""
    if all(isinstance(m.recipe.modality, Uniform) for m in answers.methods):
        return []
    return [
        "",
        "Where what a policy must keep does not fit a share, the smallest share that holds it is taken for that "
        "question; the bytes are those. `skip_visual` keeps less where it skips the picture.",
    ]


def _everything(answers: Methods) -> Iterable[str]:
    """All methods."""
    added = additions_table(answers)
    return [
        f"n = {answers.n}; intervals are 95 % over questions, ratios are paired.",
        *proxy_note(answers.names),
        "",
        "### Bytes needed",
        "",
        needed_table(answers),
        "",
        *(["### What a budget or policy adds to the same scorer", "", added, ""] if additions(answers) else []),
        "### Accuracy by kept share of tokens",
        "",
        fraction_table(answers, answers.methods),
        *few_note([answers.scored(row) for method in answers.methods for row in method.rows]),
        "",
        "### Smallest kept share without a loss that is shown, by kind of question",
        "",
        kinds_table(answers, answers.methods, lambda method, kind: kind.holds(method)),
        "",
        f"### Accuracy at {KIND_FRACTION:.0%} by kind of question",
        "",
        kinds_table(answers, answers.methods, lambda method, kind: kind.accuracy(method)),
        "",
    ]
