"""Claims 1 to 4: what sets visual tokens apart, and what knowing it is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvferry.evaluate.records import Protocol
from kvferry.evaluate.tables import interval
from kvferry.selection.modality import SkipVisual
from kvferry.statistics import Estimate, difference_interval, mean_interval, ratio_interval
from study.claims.base import PART, Finding, Raw, judge, listed
from study.codec_tables import percent
from study.method_tables import additions
from study.methods import SHARES

ANALYSIS = "analyze-{}.json"
HALF = 1 / math.sqrt(2)
"""Below it a ratio is nearer to a half than to one."""
STRANGER = "the control model was asked kinds of question too that it was not trained on"
EXPONENTIAL = 0.1 * (1 + math.log(10))
"""What the largest tenth of exponentially distributed weights holds; tails that hold more are heavy."""
LESS = 0.7
"""30 % less bandwidth."""
SAFE = 0.95
"""Share of text-only questions that has to keep its answer."""
MOST_TOKENS = 0.25
"""Kept share at which skipping is shown."""

Floats = npt.NDArray[np.float64]


def rank(raw: Raw) -> Finding:
    """Claim 1."""
    ratios, parts, tokens = {}, [], set()
    for model in raw.models(ANALYSIS):
        found = raw.json(ANALYSIS.format(model))
        samples = np.array(found["rank"]["samples"], np.float64)
        kinds: list[str] = found["axes"]["kind"]
        both = _known(samples[:, [kinds.index("keys"), kinds.index("values")]].mean(1))
        ratios[model] = ratio_interval(both[:, 0], both[:, 1])
        each = {k: ratio_interval(*_known(samples[:, i]).T) for i, k in enumerate(kinds)}
        parts.append(f"{model}: {', '.join(f'{k} {interval(x, 2)}' for k, x in each.items())}")
        tokens.add(round(found["rank"]["tokens"]))
    return Finding(
        "rank, visual to text: " + _each(ratios, 2),
        judge({"": {model: x.high < HALF for model, x in ratios.items()}}),
        f"At equal counts of {' or '.join(map(str, sorted(tokens)))} tokens a prompt, keys and values averaged, the "
        "visual tokens span fewer directions.",
        "the whole interval is nearer to a half than to one (below 0.71)",
        tuple(parts),
    )


def tail(raw: Raw) -> Finding:
    """Claim 2."""
    shares, parts = {}, []
    for model in raw.models(ANALYSIS):
        found = raw.json(ANALYSIS.format(model))["tail"]
        shares[model] = mean_interval(_known(np.array(found["samples"], np.float64)))
        layers = [layer[10] for layer in found["visual"]]
        heavy = sum(x > EXPONENTIAL for x in layers)
        parts.append(f"{model}: above it in {heavy} of {len(layers)} layers ({', '.join(f'{x:.0%}' for x in layers)})")
    parts.append(STRANGER)
    return Finding(
        "of the question's attention on the picture the top 10 % of tokens hold: " + _each(shares, 1, " %"),
        judge({"": {model: x.low > EXPONENTIAL for model, x in shares.items()}}),
        f"Even attention would give 10 %, exponentially falling attention {EXPONENTIAL:.0%}; layers differ.",
        "the whole interval lies above what the top tenth of an exponential distribution holds, over which a tail "
        "counts as heavy",
        tuple(parts),
    )


def bandwidth(raw: Raw) -> Finding:
    """Claim 3."""
    places: tuple[tuple[str, Protocol, bool], ...] = (
        ("protocol A, published scorers", "A", True), ("protocol A", "A", False), ("protocol B", "B", False),
    )  # fmt: skip
    found: dict[str, dict[str, Estimate]] = {}
    parts = []
    n = 0
    for model in raw.models("scorers-{}.jsonl"):
        for place, protocol, published in places:
            measured = raw.methods(f"scorers-{model}.jsonl", protocol)
            aware, agnostic = (measured.best(sort, SHARES[0], published=published) for sort in (True, False))
            if aware is not None and agnostic is not None:
                ratio = measured.estimate(aware[1] / agnostic[1])
                found.setdefault(place, {})[model] = ratio
                parts.append(f"{place}, {model}: `{aware[0].name}` to `{agnostic[0].name}`, {interval(ratio, 2)}")
            n = measured.n
    verdict = judge({place: {m: x.high <= LESS for m, x in by.items()} for place, by in found.items()})
    text = "; ".join(f"{place}: {_each_mean(by)}" for place, by in found.items())
    return Finding(
        f"bytes for {SHARES[0]:.0%} of full, best aware of modality to best unaware. {text}; n = {n}",
        verdict,
        "VL-Cache's scores beat the other published ones, but kvferry's `leaveout`, unaware of modality, needs no "
        "more, and before the question is known (protocol B) unaware scores win."
        if verdict.startswith(PART)
        else "The best methods of both sorts are held against each other, each chosen anew in every draw.",
        "the whole interval of the ratio lies at 0.7 or below",
        (*parts, *_policies(raw)),
    )


def skip(raw: Raw) -> Finding:
    """Claim 4."""
    shares, others, parts = {}, {}, []
    for model in raw.models(ANALYSIS, ("cloud", "edge")):
        found = raw.json(ANALYSIS.format(model))["harm"]
        samples = _known(np.array(found["samples"], np.float64))
        same, alone = samples[:, -1], samples[:, 0] == 0
        shares[model] = mean_interval(same[alone])
        others[model] = mean_interval(same[~alone])
        if raw.has(f"policies-{model}.jsonl"):
            parts += _skipping(raw, model)
    return Finding(
        "text-only questions that keep their first answer token without the picture: "
        + _each(shares, 0, " %")
        + " each",
        judge({"": {model: x.low > SAFE for model, x in shares.items()}}),
        f"Of the other questions {_each_mean(others, 100)} % do; no change among {min(x.n for x in shares.values())} "
        "still allows for 5 % that would.",
        "the whole interval lies above 95 %; the control model knows no such question",
        tuple(parts),
    )


def _skipping(raw: Raw, model: str) -> list[str]:
    """What the policy ``skip_visual`` did to text-only questions, and to how many bytes, beside the full cache."""
    measured = raw.measured(f"policies-{model}.jsonl")
    mine = np.array([line.kind == "lookup" for line in measured.lines])
    full = measured.correct[measured.names.index(measured.full), mine]
    said = []
    for point in measured.points.values():
        if point.recipe and isinstance(point.recipe.modality, SkipVisual) and point.recipe.fraction == MOST_TOKENS:
            gap = difference_interval(measured.correct[measured.names.index(point.name), mine], full)
            size = np.mean([x.outcomes[point.name][1] for x in measured.lines if x.kind == "lookup"])
            said.append(
                f"{model}, `{point.name}`, text-only questions: {percent(gap)} points to the full cache at "
                f"{size:,.0f} bytes, n = {gap.n}"
            )
    return said


def _policies(raw: Raw) -> list[str]:
    """With how many scorers a policy or budget needs less than the same scorer without."""
    said = []
    for file in (f"{kind}-{model}.jsonl" for kind in ("policies", "scorers") for model in ("cloud", "edge", "control")):
        if raw.has(file):
            ratios = [estimates[0] for *_, estimates in additions(raw.methods(file))]
            fewer = sum(x.high <= LESS for x in ratios)
            said.append(
                f"{file}, protocol A: of {len(ratios)} scorers with a budget or policy by modality {fewer} need 30 % "
                "less than the same scorer without"
            )
    return said


def _known(values: Floats) -> Floats:
    """Per-prompt values without the prompts where one was not measured."""
    known: Floats = values[~np.isnan(values.reshape(len(values), -1)).any(-1)]
    return known


def _each(found: Mapping[str, Estimate], digits: int, unit: str = "") -> str:
    by = 100 if unit else 1
    texts = {m: interval(Estimate(x.mean * by, x.low * by, x.high * by, x.n), digits) + unit for m, x in found.items()}
    return listed(texts, min(x.n for x in found.values()))


def _each_mean(found: Mapping[str, Estimate], by: float = 1) -> str:
    digits = 0 if by > 1 else 2
    return ", ".join(
        f"{model} {interval(Estimate(x.mean * by, x.low * by, x.high * by, x.n), digits)}" for model, x in found.items()
    )
