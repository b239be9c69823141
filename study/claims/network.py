"""Claims 14 and 15: the policy on recorded links, and agents that share one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvferry.statistics import Estimate
from study.claims.base import PART, Finding, MissingError, Raw, judge, within
from study.codec_tables import percent

LINKS = {
    "5G at uplink rates": "simulate-5g-uplink.json",
    "5G downlink": "simulate-5g-downlink.json",
    "cellular uplink": "simulate-cellular.json",
}
OURS, THEIRS, STATIC = "risk-aware", "greedy", "static:kv:full|int8"
NEAR = 0.985
"""Within 1.5 % of the oracle."""
ALL, NONE = 0.95, 0.05
"""Rounds in time that count as all and as none: the first of a session knows nothing of the link."""


def adaptive(raw: Raw) -> Finding:
    """Claim 14."""
    held: dict[str, dict[str, bool]] = {"within 1.5 % of the oracle": {}, "in time more often": {}}
    said, parts, shares = [], [], []
    n = 0
    for link, file in LINKS.items():
        if not raw.has(file):
            continue
        found = raw.json(file)
        near, more, texts = [], [], []
        for seconds in dict.fromkeys(row["deadline"] for row in found["rows"]):
            greedy, static = (_row(found, seconds, way) for way in (THEIRS, STATIC))
            share, time, other = _of(greedy, "of_oracle"), _of(greedy, "on_time"), _of(static, "on_time")
            n = time.n
            near.append(share.low >= NEAR)
            more.append(time.low > other.high)
            texts.append([within(x, digits=0) for x in (time, other)])
            shares.append(share.mean)
            parts += [
                f"{link}, {seconds:g} s, {way}: in time {percent(_of(row, 'on_time'))} %, "
                f"{percent(_of(row, 'of_oracle'))} % of the oracle's quality"
                for way, row in ((x, _row(found, seconds, x)) for x in (THEIRS, OURS, STATIC))
            ]
        held["within 1.5 % of the oracle"][link] = all(near)
        held["in time more often"][link] = all(more)
        said.append(f"{link} {' against '.join(' / '.join(column) for column in zip(*texts, strict=True))}")
        parts.append(f"{link}: {found['title']}, {found['requests']:,} questions a deadline")
    if not said:
        raise MissingError(f"there is no {raw.folder / next(iter(LINKS.values()))}")
    return Finding(
        f"% in time at 1 / 3 / 5 s, their policy against static INT8. {'; '.join(said)}; quality {min(shares):.0%} to "
        f"{max(shares):.0%} of the oracle's; n = {n} sessions a link",
        judge(held),
        "It gains where links are slow and is late more often where the full cache seems to fit; a late answer "
        "counts 0, and then the oracle is far."
        if judge(held).startswith(PART)
        else "A late answer counts 0.",
        "the greedy policy (EWMA 0.3, safety 0.8) on the published points of Qwen-7B: the whole interval within 1.5 % "
        "of the oracle at all deadlines; in time more often at all deadlines, the intervals apart",
        tuple(parts),
    )


def agents(raw: Raw) -> Finding:
    """Claim 15."""
    held: dict[str, dict[str, bool]] = {}
    said, parts = [], []
    for count in (4, 8):
        found = raw.json(f"simulate-agents-{count}.json")
        rounds = {x: _of(_row(found, 5.0, STATIC, x), "rounds_on_time") for x in ("equal", "model_aware")}
        equal, aware = rounds["equal"], rounds["model_aware"]
        right = equal.high < NONE and (aware.low > ALL if count == 4 else aware.high < NONE)
        held[f"{count} agents"] = {"": right}
        said.append(f"{count} agents {100 * equal.mean:.0f} % equal, {100 * aware.mean:.0f} % by size")
        parts += [
            f"{count} agents, {row['way']}, {row['allocation']}: rounds {percent(_of(row, 'rounds_on_time'))} %, "
            f"questions {percent(_of(row, 'on_time'))} %, n = {row['on_time']['n']} sessions"
            for row in found["rows"]
        ]
    if raw.has("simulate-fallback-8.json"):
        found = raw.json("simulate-fallback-8.json")
        kept = _of(_row(found, 5.0, OURS, "model_aware"), "rounds_on_time")
        held["the fallback"] = {"": kept.low > ALL}
        said.append(f"8 agents with scout to fall back on {100 * kept.mean:.0f} %")
        parts.append(f"fallback: {found['title']}, rounds {percent(kept)} %, n = {kept.n} sessions")
    return Finding(
        f"rounds in time, static INT8, 50 Mbit/s, 5 s: {'; '.join(said)}",
        judge(held),
        "Under our reading: agents of 3B, 7B, 14B and 3B, sizes by their cache per token; the first round of a session "
        "is blind, which leaves 98 of 100.",
        "equal parts under 5 % of rounds, by size over 95 % for 4 and under 5 % for 8, with the fallback over 95 %",
        tuple(parts),
    )


def _row(found: Mapping[str, Any], deadline: float, way: str, allocation: str = "") -> dict[str, Any]:
    for row in found["rows"]:
        if (row["deadline"], row["way"], row["allocation"]) == (deadline, way, allocation):
            return dict(row)
    raise MissingError(f"{found['title']} holds no {way} {allocation} at {deadline:g} s")


def _of(row: Mapping[str, Any], name: str) -> Estimate:
    if row[name] is None:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    return Estimate(**row[name])
