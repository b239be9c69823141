"""The table of claims, first on the page of results, and the page with what stands behind each verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvferry.evaluate.tables import markdown
from study.claims.base import FAILS, HOLDS, PART, UNMEASURED, UNTESTABLE, Finding, Verdict
from study.claims.smollm2 import NAME
from study.page import Places

TITLE = "What the sources claim, and what was found here"
DETAIL = "claims.md"
WORDS = (HOLDS, PART, FAILS, UNTESTABLE, UNMEASURED)


def table(verdicts: Sequence[Verdict], places: Places) -> str:
    """The section of the page of results: a line a claim."""
    link = places.link(places.details / DETAIL)
    rows = [
        [
            f"[{x.claim.number}]({link}#{_anchor(x)})", x.claim.text, x.claim.figure, _bold(x.finding.verdict),
            x.finding.why, "" if x.real is None else _bold(x.real.verdict),
        ]
        for x in verdicts
    ]  # fmt: skip
    counts = Counter(_word(x) for x in verdicts)
    said = ", ".join(f"{word} {counts[word]}" for word in WORDS if counts[word])
    return "\n".join([
        f"## {TITLE}",
        "",
        f"{len(verdicts)} claims: {said}. Behind each number: what was measured, with intervals and n; when the claim "
        f"counts as holding (the same for every model); and the commands that make it ([{DETAIL}]({link})). The last "
        f"column is the verdict on weights that others trained ({NAME}), where a claim needs no picture; counted are "
        "the others.",
        "",
        markdown(["#", "claim", "published", "verdict", "why", NAME], rows, left=(1, 2, 3, 4, 5)),
        "",
    ])  # fmt: skip


def page(verdicts: Sequence[Verdict]) -> str:
    """Everything behind the table."""
    text = [
        f"# {TITLE}", "",
        "Made by `make results`; the table is in RESULTS.md. Brackets hold 95 % intervals over questions, ± their "
        "wider side; of speeds brackets hold the least and the largest ratio of a round. Protocol A: the edge knows "
        'the question before it compresses. "Full" is the uncompressed cache.', "",
    ]  # fmt: skip
    for x in verdicts:
        text += [
            f"## Claim {x.claim.number}", "", f"**{x.claim.text}** ({x.claim.source}: {x.claim.figure})", "",
            f"* Verdict: {_bold(x.finding.verdict)}. {x.finding.why}",
        ]  # fmt: skip
        text += [f"* Measured: {x.finding.measured}"] if x.finding.measured else []
        text += [f"* It holds where: {x.finding.rule}."] if x.finding.rule else []
        text += [f"* {line}" for line in x.finding.more]
        text += _beside(x.real)
        text += [f"* From {', '.join(f'`{file}`' for file, *_ in x.commands)}"] if x.commands else []
        text += [f"* Made again by: `{x.claim.make}`"]
        text += [f"* On a checkpoint of the sources' size: `{x.claim.elsewhere}`"] if x.claim.elsewhere else []
        text.append("")
    made = {file: (command, commit) for x in verdicts for file, command, commit in x.commands}
    rows = [[f"`{file}`", f"`{commit[:12]}`", f"`{command}`"] for file, (command, commit) in sorted(made.items())]
    return "\n".join([*text, "## Raw results", "", markdown(["file", "commit", "made by"], rows, left=(1, 2)), ""])


def _beside(real: Finding | None) -> list[str]:
    """What was found on weights that others trained."""
    if real is None:
        return []
    lines = [f"* **{NAME}**: {_bold(real.verdict)}. {real.why}"]
    lines += [f"    * Measured: {real.measured}"] if real.measured else []
    lines += [f"    * It holds where: {real.rule}."] if real.rule else []
    return lines + [f"    * {line}" for line in real.more]


def _word(x: Verdict) -> str:
    return x.finding.verdict.partition(":")[0]


def _bold(verdict: str) -> str:
    word, colon, rest = verdict.partition(":")
    return f"**{word}**{colon}{rest}"


def _anchor(x: Verdict) -> str:
    return f"claim-{x.claim.number}"
