"""What is asked of SmolLM2: which rows, under which protocol, on how long texts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvferry.errors import InputError
from kvferry.evaluate.records import Protocol
from kvferry.recipe import Recipe
from study.profiles import files
from study.squad import FOLDER, PROFILES

SCORERS = (
    "q2c", "snapkv", "h2o", "streaming", "random", "vlcache", "leaveout", "knorm", "keydiff", "value_norm",
    "expected_attention",
)  # fmt: skip
FRACTIONS = (0.75, 0.5, 0.25, 0.1)
BLIND = tuple(x for x in SCORERS if x not in ("q2c", "vlcache"))
"""Scorers that protocol B has without a proxy for the question."""
AWARE = ("q2c", "vlcache", "snapkv", "leaveout")
PROXY = "What is this text about?"
"""Stands for the unknown question under protocol B. Fixed in advance, never chosen by its score."""


@dataclass(frozen=True)
class Plan:
    """One raw file.

    Parameters
    ----------
    name : str
        Of the file, ``NAME-TOKENS.jsonl``.
    protocol : {"A", "B"}
    rows : tuple of str
        Recipes; under protocol B with ``proxy`` or ``oracle`` behind them where the scorer was told a question.
    profiles : bool
        Whether rows need profiles of calibration paragraphs.
    carried : bool
        Whether every row is written to a bitstream and read again. Otherwise rows select from the cache in BF16, and
        what they drop is hidden.
    questions : int
        Of each text.
    tokens : int
        Of a prompt, at most.
    """

    name: str
    protocol: Protocol
    rows: tuple[str, ...]
    carried: bool
    questions: int = 4
    tokens: int = 512
    profiles: bool = False

    def at(self, tokens: int) -> Plan:
        """The same on other texts; longer ones have more paragraphs to ask about."""
        return replace(self, tokens=tokens, questions=max(self.questions, self.questions * tokens // 1024))


def _selections(scorers: tuple[str, ...], fractions: tuple[float, ...], label: str = "") -> tuple[str, ...]:
    return tuple(f"{s}@{f:g}|bf16{label}" for s in scorers for f in fractions)


SHARED = tuple(f"vlcache@{fraction:g},budget=shared" for fraction in (0.5, 0.25))
KVTC, TREE = (files(PROFILES)[name] for name in ("kvtc", "tree"))
WIDTHS = tuple(f"full|int{bits}" for bits in (8, 7, 6, 5, 4, 3, 2, 1))
PLANS = {
    "scorers": Plan("scorers", "A", _selections(SCORERS, FRACTIONS), carried=False),
    "blind": Plan(
        "blind", "B",
        (
            *_selections(BLIND, FRACTIONS),
            *_selections(AWARE, (0.5, 0.25), " proxy"),
            *_selections(AWARE, (0.5, 0.25), " oracle"),
        ),
        carried=False,
    ),
    "codecs": Plan(
        "codecs", "A",
        (
            "full|bf16|zstd", *WIDTHS, *(f"full|int{bits}|zstd" for bits in (8, 4, 3, 2)),
            f"full|mixed@{FOLDER}/protected.json", f"full|mixed@{FOLDER}/mixed.json",
            "full|kivi:4", "full|kivi:2", "full|turbo:3.5",
            *(f"q2c@{f:g}|int{bits}" for f in (0.75, 0.5, 0.25) for bits in (8, 4, 3)),
            *(f"snapkv@{f:g}|int4" for f in (0.75, 0.5, 0.25)),
        ),
        carried=True, questions=2,
    ),
    "coders": Plan(
        "coders", "A",
        (
            "full|int4", "full|fp8", "full|delta:10", "full|delta:0", "full|int4,coder=range", "full|turbo:4",
            "full|turbo:3", *(f"full|svd:{rank}" for rank in (128, 96, 64, 32, 16)),
        ),
        carried=True, questions=1,
    ),
    "profiles": Plan(
        "profiles", "A",
        (
            "full|int4|zstd", "full|kivi:2", "full|turbo:3.5", "full|turbo:2.5",
            *(f"full|kvtc:{ratio}@{KVTC}|zstd" for ratio in (8, 16, 32)),
            *(f"full|transform:{ratio}@{TREE}" for ratio in (8, 16, 32, 64, 128)),
            *(f"{choice}|transform:{ratio}@{TREE}" for choice in SHARED for ratio in (8, 32)),
        ),
        carried=True, questions=2, profiles=True,
    ),
}  # fmt: skip


def plan_of(name: str, tokens: int = 512) -> Plan:
    """By name.

    Raises
    ------
    InputError
        There is none of that name, or fewer tokens than a text needs.
    """
    if name not in PLANS:
        raise InputError(f"there is no plan {name!r}; there are {', '.join(PLANS)}")
    if tokens < 384:
        raise InputError(f"a prompt of {tokens} tokens has no room for a paragraph; take at least 384")
    return PLANS[name].at(tokens)


def canonical(rows: tuple[str, ...]) -> tuple[str, ...]:
    """The rows with their recipes in canonical form."""
    found = []
    for row in rows:
        recipe, _, label = row.partition(" ")
        found.append(f"{Recipe.parse(recipe)} {label}".strip())
    return tuple(found)
