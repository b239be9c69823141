"""``kvferry check``: a table for people, an object for scripts, an exit code for both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as tf
from typer.testing import CliRunner

from kvferry.cli.app import app
from kvferry.errors import InputError, ModelError
from kvferry.models.check import TOLERANCE, WHAT, Difference, Verdict, families
from kvferry.models.check.table import BEGIN, END, summary, write_into
from tests.models.families import TEXT

RIGHT = Verdict("llama", "LlamaForCausalLM", differences=dict.fromkeys(WHAT, Difference(1e-6, "layer 0")), moved=2.0)
OFF = Difference(3.8, "answer token 0")
WRONG = Verdict("doge", "DogeForCausalLM", differences=dict.fromkeys(WHAT, OFF), moved=2.0)
TIED = Verdict("diffllama", "DiffLlamaForCausalLM", moved=2.0,
               differences={**RIGHT.differences, "heads": Difference(4.6, "answer token 3")})  # fmt: skip
BLIND = Verdict("even", "EvenForCausalLM", differences=RIGHT.differences, moved=0.01)
UNTRIED = Verdict("kosmos-2", "Kosmos2ForConditionalGeneration", unchecked="ValueError: no pixels")


def test_a_folder_with_a_configuration_is_enough(tmp_path: Path) -> None:
    tf.LlamaConfig(**TEXT).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 0
    assert "llama, LlamaForCausalLM" in result.output
    assert result.output.strip().endswith("supported; tried with text")
    assert result.output.count(" yes ") == len(WHAT)


def test_what_is_not_supported_is_exit_code_1(tmp_path: Path) -> None:
    tf.DogeConfig(**TEXT).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--json"])
    assert result.exit_code == 1
    record = json.loads(result.output)
    assert not record["supported"]
    assert record["differences"]["full"]["size"] > 1
    assert "own forward pass by" in record["reason"]
    assert Verdict.of_dict(record).as_dict() == record


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    runner = CliRunner()
    assert isinstance(runner.invoke(app, ["check"]).exception, InputError)
    assert isinstance(runner.invoke(app, ["check", "testbed/edge", "--all"]).exception, InputError)
    assert isinstance(runner.invoke(app, ["check", str(tmp_path)]).exception, ModelError)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "no class for them that generates text" in str(runner.invoke(app, ["check", str(tmp_path)]).exception)
    (tmp_path / "config.json").write_text("{")
    assert isinstance(runner.invoke(app, ["check", str(tmp_path)]).exception, ModelError)


def test_all_families_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("llama", "LlamaForCausalLM"), ("doge", "DogeForCausalLM"), ("kosmos-2", UNTRIED.model)]
    monkeypatch.setattr(families, "families", lambda: iter(pairs))
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    first = list(families.check_all(rows))
    rows.write_text(rows.read_text() + '{"family": "half')
    monkeypatch.setattr(families, "check_apart", lambda *_: pytest.fail("tried again"))
    result = CliRunner().invoke(app, ["check", "--all", "--out", str(rows), "--into", str(page)])
    assert result.exit_code == 0
    assert [x.supported for x in first] == [True, False, False]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| llama | LlamaForCausalLM |" in text.split("### Text")[1].split("### Refused")[0]
    assert "| doge |" in text.split("### Refused")[1].split("### Not tried")[0]
    assert "| kosmos-2 |" in text.split("### Not tried")[1]
    with pytest.raises(InputError, match="no place for the table"):
        write_into(rows, first)


def test_verdicts() -> None:
    assert RIGHT.supported
    assert not RIGHT.tied_heads
    assert TIED.supported
    assert TIED.tied_heads
    assert WRONG.reason == f"{WHAT['full']} by 3.8 at answer token 0, where {TOLERANCE:g} is allowed"
    assert "nothing can be said" in BLIND.reason
    assert UNTRIED.reason == "it could not be tried out (ValueError: no pixels)"
    said = summary([RIGHT, TIED, WRONG, BLIND, UNTRIED])
    assert "of 5 families 2 are supported, 0 of them with pictures; 2 are refused, and 1 could not be tried" in said
    assert "differ by 1e-06 at most, where they do not by 4 at least" in said
