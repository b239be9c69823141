"""Pages of what SmolLM2 answered from compressed caches: a page for each raw file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.codecs.tree import MOST_STARTS
from kvferry.evaluate.measured import Measured, Point
from kvferry.evaluate.tables import interval, markdown
from kvferry.statistics import Estimate, estimate_of, holm, means_with_draws
from study.codec_tables import kept_table, p_head, p_text, percent, retention_tables, times
from study.squad.plans import PROXY
from study.squad.records import BARE, FULL, made_by, read

TITLES = {
    "scorers": "which tokens, question known (A)",
    "blind": "which tokens, question unknown (B)",
    "codecs": "how few bits, and retention by bits",
    "coders": "SVD by rank, differences, range coding",
    "profiles": "codecs that hold a profile, beside those that do not",
}
"""By the name of a plan."""
SCORES = ("F1", "EM", "contains")


class Told:
    """One raw file, and what its rows come to."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.head, self.records = read(file)
        self.plan: dict[str, Any] = self.head["squad"]
        self.rows = list(self.records[0].outcomes) if self.records else []
        self._groups = [str(x.text) for x in self.records]

    @property
    def n(self) -> int:
        """Questions."""
        return len(self.records)

    @cached_property
    def measured(self) -> Measured:
        """F1 and KL of every row."""
        return Measured([x.line() for x in self.records], self.plan["protocol"])

    def score(self, row: str, name: str) -> Estimate:
        """Mean of one of :data:`SCORES`."""
        return self._mean([x.scores[row][name] for x in self.records])

    def agree(self, row: str) -> Estimate:
        """Share of tokens with the same first choice."""
        return self._mean([x.outcomes[row].agree for x in self.records])

    def same(self, row: str) -> Estimate:
        """Share of questions with the full cache's answer, word for word."""
        return self._mean([float(x.words(row) == x.said) for x in self.records])

    def kl(self, row: str) -> Estimate:
        """Nats a token."""
        found = self.measured.kl(row)
        assert found is not None
        return found

    def kl_median(self, row: str) -> float:
        """Nats a token of the middle question."""
        return float(np.median([x.outcomes[row].kl for x in self.records]))

    def _mean(self, values: Sequence[float]) -> Estimate:
        return estimate_of(means_with_draws(np.array(values, np.float64)[None], groups=self._groups)[0], self.n)


def told_in(folder: Path) -> list[Told]:
    """Every raw file that holds questions, the short texts first."""
    found = [Told(file) for file in folder.glob("*-*.jsonl")]
    order = list(TITLES)
    return sorted((x for x in found if x.n), key=lambda x: (order.index(x.plan["name"]), x.plan["tokens"]))


def title_of(told: Told) -> str:
    """Of a page."""
    return f"SmolLM2-135M on SQuAD, {told.plan['tokens']} tokens: {TITLES[told.plan['name']]}"


def page(told: Told) -> str:
    """A raw file's page."""
    name, protocol = told.plan["name"], told.plan["protocol"]
    text = [f"# {title_of(told)}", "", *_origin(told), "", *_ends(told), ""]
    if name in ("scorers", "blind"):
        text += _by_fraction(told)
    if name == "codecs":
        text += ["## Retention by bits", "", *_retained(told)]
    if name in ("codecs", "coders", "profiles"):
        text += ["## The fewest bytes at 98 % of the full cache's F1", "", kept_table(told.measured), ""]
    text += [f"## Every row, protocol {protocol}", "", _rows(told), ""]
    return "\n".join(text)


def _origin(told: Told) -> Iterator[str]:
    plan, head = told.plan, told.head
    texts = len({x.text for x in told.records})
    tokens = np.mean([x.tokens for x in told.records])
    yield (
        f"Model `{plan['model']}` (SmolLM2-135M-Instruct's own weights, {head['parameters']:,} parameters, computed in "
        f"{head['dtype']}), SQuAD's test articles, prompt `{plan['prompt']}` (chosen on calibration paragraphs: "
        f"[prompts](smollm2-prompt.md)). n = {told.n} questions on {texts} texts of {tokens:.0f} tokens in the mean, "
        f"all paired; intervals are 95 %, drawn by texts. Made by {made_by(head)}; "
        f"torch {head['torch']}, {head['machine']}; the same command goes on from there."
    )
    if not any(x.outcomes[FULL].bytes for x in told.records):
        yield (
            "Rows choose from the cache as `full|bf16` carries it, and what they drop is hidden from the question and "
            "the answer; no bitstreams are written, since rows of one fraction keep equally many tokens."
        )
    if "profiles" in head:
        yield from _profiles(head["profiles"])
    if plan["protocol"] == "B":
        yield f'*proxy* rows are scored with "{PROXY}", *oracle* rows with the question that comes later.'


def _profiles(made: dict[str, Any]) -> Iterator[str]:
    sizes = ", ".join(f"`{name}.profile` {of['bytes'] / 1e6:.1f} MB" for name, of in made.items())
    yield (
        f"Both ends hold profiles of {made['tree']['n']} calibration texts under the same prompt, which the bytes do "
        f"not count: {sizes}. The prompt begins with the same worked examples every time; `transform` knows its first "
        f"{MOST_STARTS} tokens, whose keys and values nothing else changes, by heart."
    )


def _ends(told: Told) -> Iterator[str]:
    for label, row in (("Ceiling, the full cache", FULL), ("Floor, the question without the text", BARE)):
        said = ", ".join(f"{x} {interval(told.score(row, x))}" for x in SCORES)
        yield f"* {label}: {said}" + ("" if row == FULL else f"; KL {interval(told.kl(row), 2)}")


def methods_of(told: Told) -> dict[str, dict[float, Point]]:
    """Rows by scorer and fraction, the scorer with the label of what it knew."""
    found: dict[str, dict[float, Point]] = {}
    for point in told.measured.points.values():
        if point.recipe is not None and not point.whole:
            label = point.name.partition(" ")[2]
            found.setdefault(f"{point.base} {label}".strip(), {})[point.recipe.fraction] = point
    return found


def _by_fraction(told: Told) -> Iterator[str]:
    methods = methods_of(told)
    fractions = sorted({f for rows in methods.values() for f in rows}, reverse=True)
    nearest = sorted(methods, key=lambda m: told.kl(methods[m][0.25].name).mean)
    figures: dict[str, Callable[[str], str]] = {
        "KL to the full cache along its answer, nats a token [95 %]; in brackets the median": lambda row: (
            f"{interval(told.kl(row), 2)} ({told.kl_median(row):.2f})"
        ),
        "First choice as the full cache's, % of tokens": lambda row: percent(told.agree(row)),
        "F1 in % of the full cache's": lambda row: percent(told.measured.of_full(row)),
    }
    for title, cell in figures.items():
        rows = [[f"`{m}`", *(cell(methods[m][f].name) if f in methods[m] else "" for f in fractions)] for m in nearest]
        yield from (f"## {title}", "", markdown(["scorer", *(f"{f:.0%} kept" for f in fractions)], rows), "")


def _retained(told: Told) -> Iterator[str]:
    yield from retention_tables(told.measured)
    points = [p for p in told.measured.points.values() if p.bits and p.stage == "packed" and p.recipe is not None]
    families = dict.fromkeys(p.base for p in points if not p.whole)
    for family in families:
        mine = {(p.recipe.fraction, p.bits): p for p in points if p.recipe and (p.base == family or p.whole)}
        bits = sorted({b for f, b in mine if f < 1 and b}, reverse=True)
        rows = [
            [f"{f:.0%}", *(interval(told.kl(mine[f, b].name), 2) if (f, b) in mine else "" for b in bits)]
            for f in sorted({f for f, _ in mine}, reverse=True)
        ]
        yield from (
            f"`{family}`: KL in nats a token",
            "",
            markdown(["tokens kept", *(f"INT{b}" for b in bits)], rows),
            "",
        )


def _rows(told: Told) -> str:
    measured = told.measured
    order = sorted(told.rows, key=lambda row: (row == BARE, row != FULL, told.kl(row).mean))
    others = [row for row in order if row != FULL]
    ps = dict(zip(others, holm([measured.compare(row, FULL).p for row in others]), strict=True))
    carried = told.records[0].outcomes[FULL].bytes is not None
    rows = []
    for row in order:
        cells = [f"`{row}`" + (" (ceiling)" if row == FULL else " (floor)" if row == BARE else "")]
        cells += [interval(told.kl(row)), percent(told.agree(row)), percent(told.same(row))]
        cells += [interval(told.score(row, "F1")), percent(measured.of_full(row))]
        cells += [p_text(ps[row]), measured.compare(row, FULL).words] if row in ps else ["", ""]
        cells += [f"{told.score(row, x).mean:.3f}" for x in ("EM", "contains")]
        if carried:
            cells += [f"{measured.bytes[row]:,.0f}", times(measured.shrink(row).mean)]
        rows.append(cells)
    head = ["row", "KL (nats)", "same first choice, %", "same answer, %", "F1", "% of full", p_head(len(others))]
    head += ["F1 against full", "EM", "contains", *(["bytes", "smaller than BF16"] if carried else [])]
    return markdown(head, rows, left=(7,))


def prompt_page(found: dict[str, Any]) -> str:
    """Which prompts were tried, and how the full cache did on each."""
    names = ("F1", "EM", "contains", "log-likelihood")
    rows = [
        [
            f"`{name}`", *(interval(_estimate(x[k]), 2 if k == names[-1] else 3) for k in names),
            "" if name in found["fit"] else "no", found["said"][name][0].replace("\n", " "),
        ]
        for name, x in found["candidates"].items()
    ]  # fmt: skip
    chosen = max(found["fit"], key=lambda name: float(found["candidates"][name]["F1"][0]))
    return "\n".join([
        "# How SmolLM2-135M is asked about SQuAD's paragraphs", "",
        f"The full cache's answers to n = {found['n']} questions on calibration paragraphs, by prompt: a completion "
        "(`Question: ... Answer:`) or the model's chat template, with so many worked examples, a sentence, a question "
        "and a short answer each, from other articles; `plain` is a chat that is not told to be brief. The first line "
        "is judged. The log-likelihood is that of the first accepted answer and its end, in nats a token. "
        f"Examples may take half of a prompt of {found['tokens']} tokens; of those that fit, "
        f"**`{chosen}`** has the highest F1 and asks in all that follows. Made by `{found['command']}` at commit "
        f"`{found['commit'][:12]}`.", "",
        markdown(["prompt", *names, "fits", "says first"], rows, left=(6,)), "",
    ])  # fmt: skip


def _estimate(ends: Sequence[float]) -> Estimate:
    mean, low, high = ends
    return Estimate(mean, low, high, 0)
