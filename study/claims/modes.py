"""Claim 13: what each way of sending a cache costs and keeps."""

from __future__ import annotations

from kvferry.codecs import Mixed
from kvferry.evaluate.measured import Measured, Point
from kvferry.statistics import holm
from study.claims.base import Finding, MissingError, Raw, judge, listed, need, within
from study.codec_tables import p_head, p_text, percent

CODECS = "codecs-{}.jsonl"
INT8, INT4 = "full|int8", "full|int4"
LOSSLESS = 0.994
SURE = 0.05


def steps(raw: Raw) -> Finding:
    """The cache's rows of the sources' table."""
    texts, parts, n = {}, [], 0
    held: dict[str, dict[str, bool]] = {"INT8 lossless": {}, "mixed above INT4": {}, "mixed below INT8": {}}
    for model in raw.models(CODECS):
        measured = raw.measured(CODECS.format(model))
        need(measured, INT8, INT4)
        mixed = mixed_row(measured)
        rows = (measured.full, INT8, mixed.name, INT4)
        n = measured.n
        texts[model] = " / ".join(
            f"{within(measured.of_full(row))} at {measured.bytes[row] / measured.bf16:.2f}" for row in rows
        )
        over, under = measured.compare(mixed.name, INT4), measured.compare(INT8, mixed.name)
        p = holm([over.p, under.p])
        held["INT8 lossless"][model] = measured.of_full(INT8).low >= LOSSLESS
        held["mixed above INT4"][model] = over.difference.low > 0 and p[0] < SURE
        held["mixed below INT8"][model] = under.difference.low > 0 and p[1] < SURE
        parts += [f"{model}, `{row}`: {percent(measured.of_full(row))} % of full, {measured.bytes[row]:,.0f} bytes"
                  for row in rows]  # fmt: skip
        points = f"{percent(over.difference)} points, {p_head(2)} {p_text(p[0])}: {over.words}"
        parts.append(f"{model}, mixed minus INT4: {points}")
    return Finding(
        f"full / INT8 / mixed / INT4, % of full at the share of BF16 bytes, protocol A: {listed(texts, n)}",
        judge(held),
        "INT4 loses nothing here, so there are no steps between it and INT8; the shipped mixed profile, made for "
        "INT3's bytes, is the smallest of the four.",
        "INT8 keeps 99.4 % (whole interval); mixed is more right than INT4 and less right than INT8 (both p below 0.05 "
        "by Holm)",
        tuple(parts),
    )


def mixed_row(measured: Measured) -> Point:
    """The whole cache by a profile."""
    for point in measured.points.values():
        if point.whole and isinstance(point.codec, Mixed):
            return point
    raise MissingError("the results hold no row full|mixed@PROFILE; sweep it too")
