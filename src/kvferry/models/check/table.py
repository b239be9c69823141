"""The table of all families in docs/models.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kvferry.errors import InputError
from kvferry.files import write_whole
from kvferry.models.check.families import versions
from kvferry.models.check.verdict import TOLERANCE, WHAT, Verdict

BEGIN, END = "<!-- families: kvferry check --all -->", "<!-- end of families -->"
_HEAD = ("family", "class", "full", "evict", "per head", "evidence", "resume")


def page(verdicts: Sequence[Verdict]) -> str:
    """All verdicts as Markdown."""
    return "\n".join([*_page(verdicts)])


def write_into(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Put the tables between the markers of a page.

    Raises
    ------
    InputError
        The page has no such markers.
    """
    try:
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path} has no place for the table; it needs the lines {BEGIN} and {END}") from error
    write_whole(path, f"{before}{BEGIN}\n{page(verdicts)}\n{END}{after}")


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many families of each kind, and how far right and wrong ones lie apart."""
    good = [x for x in verdicts if x.supported]
    untried = [x for x in verdicts if x.unchecked and not x.refused]
    right = max(d.size for x in good for name, d in x.differences.items() if name != "heads" or not x.tied_heads)
    sizes = [d.size for x in verdicts for d in x.differences.values() if not d.right and not d.error]
    refused = len(verdicts) - len(good) - len(untried)
    return (
        f"Transformers {versions()['transformers']}, PyTorch {versions()['torch']}: of {len(verdicts)} families "
        f"{len(good)} are supported, {sum(x.pictures for x in good)} of them with pictures; {refused} are refused, and "
        f"{len(untried)} could not be tried. Where two ways agree they differ "
        f"by {right:.0e} at most, where they do not by {min(sizes, default=float('nan')):.1g} at least; {TOLERANCE:g} "
        "is allowed."
    )


def _page(verdicts: Sequence[Verdict]) -> Iterator[str]:
    good = [x for x in verdicts if x.supported]
    yield f"\n{summary(verdicts)}\n"
    yield f"### Pictures and text\n\n{_numbers(x for x in good if x.pictures)}\n"
    yield (
        "### Text\n\nFamilies of vision-language models stand here too where no small pictures could be made for them: "
        f"only their text was tried.\n\n{_numbers(x for x in good if not x.pictures)}\n"
    )
    untried = [x for x in verdicts if x.unchecked and not x.refused]
    bad = [x for x in verdicts if not x.supported and x not in untried]
    yield f"### Refused\n\n{_reasons(bad)}\n"
    yield f"### Not tried, and therefore refused\n\n{_reasons(untried)}\n"


def _numbers(verdicts: Iterable[Verdict]) -> str:
    lines = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
    for verdict in sorted(verdicts, key=lambda x: x.family):
        cells = [str(verdict.differences[name]) for name in WHAT]
        cells[2] = "`budget=shared` only" if verdict.tied_heads else cells[2]
        lines.append(f"| {verdict.family} | {verdict.model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _reasons(verdicts: Iterable[Verdict]) -> str:
    lines = ["| family | class | why |", "|---|---|---|"]
    for verdict in sorted(verdicts, key=lambda x: x.family):
        reason = verdict.reason.replace("|", "\\|").replace("<", "\\<")
        lines.append(f"| {verdict.family} | {verdict.model} | {reason} |")
    return "\n".join(lines)
