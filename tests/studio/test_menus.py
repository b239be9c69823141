"""Menus and recipes say the same thing."""

from __future__ import annotations

import pytest

from kvferry import Recipe
from kvferry.errors import RecipeError
from kvferry.selection import SCORERS
from kvferry.studio import menus
from kvferry.studio.menus import STEPS, Menus, nearest_step, takes_budget


@pytest.mark.parametrize(
    "text",
    [
        "leaveout@0.1|int4|zstd", "snapkv@0.1,window=16,budget=head,merge=lookm|int4|zstd", "full|bf16", "none|kivi:2",
        "vlcache@0.015,budget=sparsity,modality=visual_heavy:0.3|turbo:2.5", "full|int4,coder=range",
        "knorm@0.25,budget=shared|transform:96",
    ],
)  # fmt: skip
def test_menus_hold_a_recipe(text: str) -> None:
    recipe = Recipe.parse(text)
    assert Menus.of(recipe).recipe == str(recipe)


def test_every_entry_makes_a_recipe_and_has_a_sentence() -> None:
    base = Menus.of(Recipe.parse(menus.DEFAULT_RECIPE))
    for part, table in (
        ("scorer", menus.scorers()), ("budget", menus.budgets()), ("modality", menus.policies()),
        ("merge", menus.merges()), ("codec", menus.codecs()),
    ):  # fmt: skip
        for name, told in table.items():
            turned = Menus(**{**base.__dict__, part: name})
            assert Menus.of(Recipe.parse(turned.recipe), base.percent).recipe == turned.recipe
            assert told.endswith(".")
            assert "`" not in told
    assert set(menus.scorers()) == set(SCORERS)


def test_what_fixes_itself_takes_no_budget() -> None:
    assert not takes_budget("full")
    assert not takes_budget("none")
    assert takes_budget("snapkv,window=16")
    turned = Menus.of(Recipe.parse("full|int8"), percent=30)
    assert turned.percent == 30
    assert Menus(**{**turned.__dict__, "scorer": "q2c"}).recipe == "q2c@0.3|int8"


def test_parts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(RecipeError):
        _ = Menus("leaveout", 250, "uniform", "uniform", "none", "int4", False).recipe


def test_the_slider_is_finer_where_it_matters() -> None:
    assert [STEPS[nearest_step(percent)] for percent in (0.1, 1.4, 10, 47, 100)] == [1, 1.5, 10, 50, 100]
