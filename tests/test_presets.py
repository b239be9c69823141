"""Recipes by a preset's name, shipped or tuned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.errors import RecipeError
from kvferry.presets import PRESETS
from kvferry.recipe import Recipe


@pytest.mark.parametrize("name", PRESETS)
def test_names_of_recipes(name: str) -> None:
    assert str(Recipe.parse(f" {name} ")) == PRESETS[name] != name


def test_a_file_has_its_own(tmp_path: Path) -> None:
    file = tmp_path / "a preset@home.json"
    file.write_text(json.dumps({"presets": {"tiny": "knorm@0.125|int2"}}))
    assert str(Recipe.parse(f"tiny@{file}")) == "knorm@0.125|int2"
    with pytest.raises(RecipeError, match="no preset 'balanced'; it has: tiny"):
        Recipe.parse(f"balanced@{file}")


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"presets": 3}', "\x00"])
def test_a_file_of_something_else(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError, match="kvferry tune MODEL --presets"):
        Recipe.parse(f"tiny@{file}")


def test_a_preset_is_not_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"presets": {"tiny": f"tiny@{file}"}}))
    with pytest.raises(RecipeError, match="write the recipe"):
        Recipe.parse(f"tiny@{file}")
