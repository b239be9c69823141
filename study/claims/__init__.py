"""The sources' claims held against stored raw results: claims with figures in ``sources``, one theme a file."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study.claims import capsule, codecs, modality, modes, network, scout, selection, smollm2
from study.claims.base import UNMEASURED, Claim, Finding, MissingError, Raw, Verdict
from study.claims.page import DETAIL, page, table
from study.claims.sources import CLAIMS
from study.page import Places

FINDINGS: dict[int, Callable[[Raw], Finding]] = {
    1: modality.rank,
    2: modality.tail,
    3: modality.bandwidth,
    4: modality.skip,
    5: selection.order,
    6: codecs.bits,
    7: codecs.protection,
    8: codecs.delta,
    9: codecs.spectrum,
    10: codecs.retention,
    11: scout.overlap,
    12: scout.payload,
    13: modes.steps,
    14: network.adaptive,
    15: network.agents,
    16: selection.tenth,
    17: capsule.capsule,
    18: selection.cliff,
}


def verdicts(folder: Path) -> list[Verdict]:
    """What the raw results in ``folder`` say about every claim; where they are missing, what to run."""
    raw, real = Raw(folder), smollm2.raw_in(folder)
    return [_verdict(raw, real, claim) for claim in CLAIMS]


def render(folder: Path, places: Places) -> str:
    """The section of the page of results; writes the page behind it."""
    found = verdicts(folder)
    places.details.mkdir(parents=True, exist_ok=True)
    (places.details / DETAIL).write_text(page(found))
    return table(found, places)


def _verdict(raw: Raw, real: Raw, claim: Claim) -> Verdict:
    finding, commands = _found(raw, FINDINGS[claim.number], claim.make)
    if claim.number not in smollm2.FINDINGS:
        return Verdict(claim, finding, commands)
    beside, more = _found(real, smollm2.FINDINGS[claim.number], smollm2.MAKE)
    return Verdict(
        claim, finding, (*commands, *((f"smollm2/{file}", command, commit) for file, command, commit in more)), beside
    )


def _found(raw: Raw, find: Callable[[Raw], Finding], make: str) -> tuple[Finding, tuple[tuple[str, str, str], ...]]:
    raw.heads.clear()
    try:
        finding = find(raw)
    except MissingError as error:
        finding = Finding("", UNMEASURED, f"Run `{make}`: {error}.", "")
    return finding, tuple((name, _command(head), _commit(head)) for name, head in raw.heads.items())


def _command(head: dict[str, Any]) -> str:
    """As it was typed; of many recipes the first two."""
    words = shlex.split(_last(head).get("command") or "")
    places = [i for i, word in enumerate(words) if word == "--recipe"]
    if len(places) < 3:
        return shlex.join(words)
    dropped = {j for i in places[2:] for j in (i, i + 1)}
    return shlex.join(w for i, w in enumerate(words) if i not in dropped) + f" and {len(places) - 2} more recipes"


def _commit(head: dict[str, Any]) -> str:
    return str(_last(head).get("commit", ""))


def _last(head: dict[str, Any]) -> dict[str, Any]:
    """The last run that was recorded of those that made a raw file."""
    return next((run for run in reversed(head.get("runs", [])) if run["commit"]), head)
