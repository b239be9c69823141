"""The study of codecs on text: what it asks, and how it reads its records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.errors import InputError
from kvferry.recipe import Recipe
from study import text_codecs


def test_every_recipe_is_one_and_rows_name_no_folder() -> None:
    rows = text_codecs.recipes(Path("somewhere"))
    assert len(rows) == len(text_codecs.CODECS) + len(text_codecs.EVICTED)
    for name, recipe in rows.items():
        assert "somewhere" not in name
        Recipe.parse(recipe)


def test_sizes_are_of_all_prompts_together() -> None:
    records = [
        {"bf16": 1000, "tokens": 10, "rows": {"full|int8": [500, 0.1, 1.0]}},
        {"bf16": 3000, "tokens": 30, "rows": {"full|int8": [500, 0.3, 0.5]}},
    ]
    row = text_codecs.table(records).splitlines()[-1]
    assert row.startswith("| `full\\|int8` | 4.0x | 0.2000 [0.1000, 0.3000] | 0.2000 | 75.0% [50.0%, 100.0%] |")


def test_ratios_are_read_between_rows() -> None:
    assert text_codecs.near([(4.0, 0.01), (16.0, 1.0)]) == pytest.approx(8.0)
    assert text_codecs.near([(4.0, 0.01), (16.0, 0.09)]) == 16.0
    assert text_codecs.near([(4.0, 0.2)]) == 0.0
    records = [{"bf16": 64, "tokens": 1, "rows": {"full|int8|zstd": [16, 0.0, 1], "full|int4": [8, 0.2, 1]}}] * 2
    assert text_codecs.families(records) == {"int": [(4.0, 0.0), (8.0, 0.2)]}


def test_what_the_calibration_found_stands_on_the_page(tmp_path: Path) -> None:
    assert text_codecs.told(tmp_path) == []
    classes = {"context": {"energy": 0.25, "octaves": 0}, "question": {"energy": 0.75, "octaves": 8}}
    tree = {"bytes": 2_500_000, "n": 7, "words": {"energy": 0.4}, "classes": classes}
    (tmp_path / text_codecs.PROFILES).write_text(json.dumps({"tree": tree}))
    text = "\n".join(text_codecs.told(tmp_path))
    assert "7 paragraphs: `tree` 2.5 MB. Means of words take 40%" in text
    assert "| question | 75.0% | 2.00x |" in text


def test_without_paragraphs_it_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data"):
        text_codecs.paragraphs(tmp_path, "test")
