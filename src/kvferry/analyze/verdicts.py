"""The sources' four questions about modalities, answered from the data; every answer can come out "no"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.analyze.harm import HarmResult
from kvferry.analyze.mass import MassResult
from kvferry.analyze.observe import ALONE, DROPS, FRACTIONS
from kvferry.analyze.overlap import OverlapResult
from kvferry.analyze.rank import KINDS, RankResult
from kvferry.analyze.running import mean_over
from kvferry.analyze.separability import ApartResult
from kvferry.analyze.sparsity import SparsityResult
from kvferry.analyze.survivors import SurvivorsResult
from kvferry.analyze.tail import TOP, TailResult
from kvferry.statistics import Estimate, difference_interval, mean_interval, ratio_interval

ENOUGH = 20
"""A percentile bootstrap over fewer prompts is too narrow to decide anything."""
SAFE = 0.95
"""Visual tokens "can be skipped" where at least this share of text-only questions keeps its first answer token."""
ENOUGH_TO_SKIP = 60
"""With no change in ``n`` questions, up to ``3 / n`` of all may still change (rule of three); 3 / 60 is 1 - SAFE."""
COIN = (0.4, 0.6)
"""Chances of ranking text above visual tokens that count as not telling them apart."""

YES, NO, OPEN, ABSENT = "yes", "no", "undecided", "not applicable"


@dataclass(frozen=True)
class Answer:
    """One question, its verdict, why, and the interval that decided; ``threshold`` is what it was held against."""

    question: str
    verdict: str
    words: str
    estimate: Estimate | None = None
    threshold: float | None = None


def answers(
    with_pictures: int,
    rank: RankResult,
    sparsity: SparsityResult,
    mass: MassResult,
    tail: TailResult,
    apart: ApartResult,
    harm: HarmResult,
    overlap: OverlapResult,
    survivors: SurvivorsResult,
) -> tuple[Answer, ...]:
    """The four answers; "not applicable" where no prompt has a picture."""
    if not with_pictures:
        why = "none of the prompts holds a visual token, so there is no picture to speak of."
        return tuple(Answer(question, ABSENT, why) for question in QUESTIONS)
    return (
        lower_rank(rank),
        more_aggressive(harm, sparsity, tail),
        tells_apart(apart, survivors),
        can_skip(harm, mass),
    )


QUESTIONS = (
    "Do visual tokens have lower rank than text?",
    "Can visual tokens be compressed more aggressively?",
    "Does Q2C tell modalities apart?",
    "Can visual tokens be skipped for text-only questions?",
)


def lower_rank(rank: RankResult) -> Answer:
    """Yes where the visual effective rank is below the text's: the ratio's interval lies below 1."""
    both = rank.samples[~np.isnan(rank.samples[:, 0]).any(-1)]
    cached = both[:, [KINDS.index("keys"), KINDS.index("values")]].mean(1)
    ratio = ratio_interval(cached[:, 0], cached[:, 1])
    parts = (f"{k} {both[:, i, 0].mean() / both[:, i, 1].mean():.2f}" for i, k in enumerate(KINDS))
    half = "inside" if ratio.low <= 0.5 <= ratio.high else "below" if ratio.low > 0.5 else "above"
    words = (
        f"at equal token counts ({rank.tokens:.0f} of each a prompt) the visual effective rank is "
        f"{interval_text(ratio)} of the text's ({', '.join(parts)}; n = {ratio.n}). "
        f"The sources expect half, which lies {half} the interval."
    )
    return Answer(QUESTIONS[0], _below(ratio, 1.0), words, ratio, 1.0)


def more_aggressive(harm: HarmResult, sparsity: SparsityResult, tail: TailResult) -> Answer:
    """Yes where dropping three quarters of the text moves the next token further than of the visual tokens."""
    lost = {drop: harm.samples[:, 1 + i] for i, drop in enumerate(DROPS)}
    gap = difference_interval(lost["text", 0.25], lost["visual", 0.25])
    sparse = mean_over(sparsity.samples, axis=0)
    words = (
        f"keeping a quarter of the text tokens moves the next token by {lost['text', 0.25].mean():.2g} nats, a quarter "
        f"of the visual ones by {lost['visual', 0.25].mean():.2g} (difference {interval_text(gap)}, n = {gap.n}); "
        f"keeping half, by {lost['text', 0.5].mean():.2g} and {lost['visual', 0.5].mean():.2g}. The threshold filter "
        f"finds {sparse[0]:.0%} of attention on visual tokens negligible and {sparse[1]:.0%} on text; the top {TOP} % "
        f"of visual tokens hold {tail.samples.mean():.0%} of the question's attention on the picture."
    )
    return Answer(QUESTIONS[1], _above(gap, 0.0), words, gap, 0.0)


def tells_apart(apart: ApartResult, survivors: SurvivorsResult) -> Answer:
    """Yes where the chance that Q2C ranks text above visual tokens lies outside :data:`COIN`."""
    chance = mean_interval(apart.samples)
    outside = chance.low > COIN[1] or chance.high < COIN[0]
    inside = COIN[0] <= chance.low and chance.high <= COIN[1]
    verdict = OPEN if chance.n < ENOUGH else YES if outside else NO if inside else OPEN
    words = (
        f"it ranks a random text token above a random visual one with a chance of {interval_text(chance)} "
        f"(n = {chance.n}); 0.5 is a coin, and {COIN[0]} to {COIN[1]} counts as not telling them apart."
    )
    if "q2c" in survivors.scorers:
        kept = survivors.kept[survivors.scorers.index("q2c"), FRACTIONS.index(0.5)]
        words += f" At half the budget it keeps {kept[0]:.0%} of the visual tokens and {kept[1]:.0%} of the text."
    return Answer(QUESTIONS[2], verdict, words, chance, COIN[1] if chance.mean >= 0.5 else COIN[0])


def can_skip(harm: HarmResult, mass: MassResult) -> Answer:
    """Yes where text-only questions keep their first answer token with the picture's cache dropped."""
    same = harm.samples[:, 1 + len(DROPS) + DROPS.index(("visual", 0.0))]
    alone = harm.samples[:, 0] == ALONE
    if not alone.any():
        words = (
            f'no question is marked as answered by its text alone ("needs_image": false), so this cannot be told; over '
            f"all {len(same)} questions the first answer token stays for {same.mean():.0%} without visual tokens."
        )
        return Answer(QUESTIONS[3], OPEN, words)
    share = mean_interval(same[alone])
    verdict = _above(share, SAFE)
    if verdict == YES and share.n < ENOUGH_TO_SKIP:
        verdict = OPEN
    words = (
        f"with every visual token dropped after prefill, {interval_text(share)} of {share.n} text-only questions keep "
        f"their first answer token ({SAFE:.0%} are called for, of at least {ENOUGH_TO_SKIP} questions)"
    )
    if (~alone).any():
        words += f"; of the {(~alone).sum()} others {same[~alone].mean():.0%} do"
    return Answer(QUESTIONS[3], verdict, f"{words}. {_attention(mass)}", share, SAFE)


def _attention(mass: MassResult) -> str:
    """How much of their attention text-only questions and the others spend on the picture."""
    alone = mass.samples[:, 0] == ALONE
    others = f", the others {mass.samples[~alone, 1].mean():.0%}" if (~alone).any() else ""
    return f"Text-only questions spend {mass.samples[alone, 1].mean():.0%} of their attention on the picture{others}."


def _below(estimate: Estimate, threshold: float) -> str:
    if estimate.n < ENOUGH:
        return OPEN
    return YES if estimate.high < threshold else NO if estimate.low >= threshold else OPEN


def _above(estimate: Estimate, threshold: float) -> str:
    if estimate.n < ENOUGH:
        return OPEN
    return YES if estimate.low > threshold else NO if estimate.high <= threshold else OPEN


def interval_text(estimate: Estimate) -> str:
    """A mean and its interval with two decimals, or two digits where that would read as nothing."""
    mean, low, high = map(_number, (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"


def _number(value: float) -> str:
    return f"{value:.2g}" if 0 < abs(value) < 0.05 else f"{value:.2f}"


def agreement(overlap: OverlapResult) -> list[tuple[str, list[Estimate]]]:
    """Per scorer and fraction of ``FRACTIONS``, how far both models keep the same tokens, over prompts."""
    return [
        (name, [mean_interval(overlap.samples[:, 0, i, index]) for i in range(len(FRACTIONS))])
        for index, name in enumerate(overlap.scorers)
    ]


def paragraph(found: tuple[Answer, ...]) -> str:
    """All answers as one paragraph."""
    return " ".join(f"{x.question} {x.verdict.capitalize()}: {x.words}" for x in found)
