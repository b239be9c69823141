"""A recipe as a row of menus, and back; every entry with the sentence its own module begins with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from kvferry.codecs import CODECS, codec_text
from kvferry.codecs.grammar import name_of, option_text, part_text
from kvferry.recipe import Recipe
from kvferry.selection import BUDGETS, MERGES, POLICIES, SCORERS

DEFAULT_RECIPE = "leaveout@0.1|int4|zstd"
STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)
"""Per cent of the tokens that the slider offers: finer where it matters more."""
NO_MERGE = "none"


@dataclass(frozen=True)
class Menus:
    """What every menu stands at; the texts are those of a recipe's parts, options included.

    ``percent`` is where the slider stands. Selections that say themselves what stays (``full``, ``none``) leave it, the
    budget and the policy unused.
    """

    scorer: str
    percent: float
    budget: str
    modality: str
    merge: str
    codec: str
    zstd: bool

    @classmethod
    def of(cls, recipe: Recipe, percent: float = 10.0) -> Menus:
        """Where the menus stand for a recipe; ``percent`` is kept where the recipe has none."""
        name = name_of(SCORERS, recipe.selection)
        free = takes_budget(name) and recipe.bytes is None
        return cls(
            scorer=name + option_text(recipe.selection, SCORERS[name]()),
            percent=100 * recipe.fraction if free else percent,
            budget=part_text(BUDGETS, recipe.budget),
            modality=part_text(POLICIES, recipe.modality),
            merge=NO_MERGE if recipe.merge is None else part_text(MERGES, recipe.merge),
            codec=codec_text(recipe.codec),
            zstd=recipe.lossless == "zstd",
        )

    @property
    def recipe(self) -> str:
        """The canonical text; raises :class:`~kvferry.errors.RecipeError` where the parts do not go together."""
        name, comma, options = self.scorer.partition(",")
        text = name
        if takes_budget(name):
            text += f"@{self.percent / 100:g}{comma}{options},budget={self.budget},modality={self.modality}"
        if self.merge != NO_MERGE and name != "full":
            text += f",merge={self.merge}"
        return str(Recipe.parse(f"{text}|{self.codec}" + ("|zstd" if self.zstd else "")))


def takes_budget(scorer: str) -> bool:
    """Whether a selection leaves the number of tokens open."""
    kind = SCORERS.get(scorer.partition(",")[0])
    return kind is not None and not hasattr(kind, "select")


def scorers() -> dict[str, str]:
    """Every selection with one sentence."""
    return _sentences(SCORERS)


def budgets() -> dict[str, str]:
    """Every budget with one sentence."""
    return _sentences(BUDGETS)


def policies() -> dict[str, str]:
    """Every modality policy with one sentence."""
    return _sentences(POLICIES)


def merges() -> dict[str, str]:
    """Every merge with one sentence, and none."""
    return {NO_MERGE: "What is dropped is gone."} | _sentences(MERGES)


def codecs() -> dict[str, str]:
    """Every codec that needs no file, with its default options, with one sentence."""
    plain = {codec_text(x): type(x) for name, x in CODECS.items() if name != "mixed"}
    return _sentences(plain)


def nearest_step(percent: float) -> int:
    """The index in :data:`STEPS` of the nearest one."""
    return min(range(len(STEPS)), key=lambda i: abs(STEPS[i] - percent))


def _sentences(table: Mapping[str, type]) -> dict[str, str]:
    return {name: sentence(kind) for name, kind in table.items()}


def sentence(kind: type) -> str:
    """The first line of the module that a method has to itself, or of its class."""
    module = getattr(sys.modules.get(kind.__module__), "__doc__", None)
    lines = (module or kind.__doc__ or "").strip().splitlines()
    return lines[0].replace("``", "") if lines else ""
