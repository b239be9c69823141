"""Tables that compare methods over fractions, from small made-up raw results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.errors import InputError
from kvferry.evaluate.method_tables import Answers, fraction_table, methods_of, render
from kvferry.evaluate.sweep import Line, grid
from tests.evaluate.test_tables import write

ROWS = {
    "full|bf16": (1600, 100),
    "none|bf16": (50, 20),
    "q2c@0.25|bf16 proxy": (400, 99),
    "q2c@0.1|bf16 proxy": (160, 60),
    "vlcache@0.25,budget=sparsity|bf16": (400, 90),
    "vlcache@0.1,budget=sparsity|bf16": (160, 50),
}
"""Row -> (bytes, right answers of 100)."""


def lines() -> list[Line]:
    return [
        Line(
            index=i, kind="digit" if i % 2 else "colour", protocol="B", bf16_bytes=2000, image_bytes=500, tokens=100,
            outcomes={row: (int(i * 37 % 100 < right), size) for row, (size, right) in ROWS.items()},
        )
        for i in range(100)
    ]  # fmt: skip


def test_rows_are_grouped_into_methods_by_falling_fraction() -> None:
    found = {m.name: m for m in methods_of(list(ROWS))}
    assert set(found) == {"q2c (proxy)", "vlcache,budget=sparsity"}
    assert found["q2c (proxy)"].fractions == (0.25, 0.1)
    assert found["q2c (proxy)"].rows[1] == "q2c@0.1|bf16 proxy"


def test_the_table_says_what_a_method_needs() -> None:
    answers = Answers(lines(), "B")
    q2c = answers.methods[0]
    assert answers.needed(q2c, 0.98).mean < 400 < answers.needed(answers.methods[1], 0.98).mean
    table = fraction_table(answers).splitlines()
    assert "ceiling" in table[2]
    assert "floor" in table[-1]
    assert table[3].startswith("| q2c (proxy) | 0.990 [")
    assert all(line.count("|") == table[0].count("|") for line in table)


def test_questions_that_some_row_lacks_do_not_count() -> None:
    records = lines()
    records[3] = replace(records[3], outcomes={"full|bf16": (1, 1600)})
    assert len(Answers(records, "B").lines) == 99


def test_the_section_names_protocol_command_and_kinds(tmp_path: Path) -> None:
    text = render(write(tmp_path / "scorers-x.jsonl", lines()), tmp_path, "Title")
    assert "Protocol B" in text
    assert "kvferry sweep --model testbed/cloud --n 40" in text
    assert "| colour | 50 | " in text
    assert (tmp_path / "scorers-x.png").stat().st_size > 10_000


def test_a_table_needs_its_ceiling() -> None:
    with pytest.raises(InputError, match="ceiling"):
        Answers([Line(0, "k", "A", 1, 1, 1, {"q2c@0.5|int8": (1, 1)})], "A")


def test_grid_crosses_budgets_and_policies() -> None:
    recipes = grid(["h2o"], [0.5], ["bf16"], "", budgets=["uniform", "sparsity"], modalities=["uniform", "adaptive"])
    assert recipes[2:] == (
        "h2o@0.5|bf16",
        "h2o@0.5,modality=adaptive|bf16",
        "h2o@0.5,budget=sparsity|bf16",
        "h2o@0.5,budget=sparsity,modality=adaptive|bf16",
    )
