"""One habit for all commands: a model is MODEL or --model, and lies where --device and --dtype say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvferry.cli.app import app
from kvferry.cli.console import model_of
from kvferry.cli.fit import KINDS
from kvferry.errors import InputError

COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
COMMANDS |= {f"fit {kind}": command for kind, command in COMMANDS.pop("fit").commands.items()}
NO_MODEL = {
    "doctor", "inspect", "link", "trace", "simulate", "break-even", "export", "compare", "coordinate", "check", "keys",
}  # fmt: skip
"""Commands that load none (check builds a small one): all others do."""


def options(name: str) -> set[str]:
    return {flag for param in COMMANDS[name].params for flag in param.opts if param.param_type_name == "option"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_that_loads_a_model_says_where(name: str) -> None:
    has = {"--device", "--dtype"} & options(name)
    assert has == (set() if name in NO_MODEL else {"--device", "--dtype"})
    if name not in NO_MODEL and name not in ("profile", "report", "fit translator"):  # two models; results name theirs
        assert "--model" in options(name)


def test_kinds_are_what_their_commands_are_by_their_old_names() -> None:
    """But for what a kind says already."""
    old = {"transform": "calibrate", "kvtc": "calibrate", "skip-visual": "calibrate-skip"}
    for kind in KINDS:
        assert "--out" in options(f"fit {kind}")
        assert "--json" in options(f"fit {kind}")
        if old.get(kind, kind) in COMMANDS:
            said = {"transform": {"--kind"}, "kvtc": {"--kind", "--structure", "--probes"}}.get(kind, set())
            assert options(old.get(kind, kind)) - options(f"fit {kind}") == said
            assert options(f"fit {kind}") <= options(old.get(kind, kind))


def test_a_model_is_named_once() -> None:
    assert model_of("a", "") == model_of("", "a") == model_of("a", "a") == model_of("", "", "a") == "a"
    with pytest.raises(InputError, match="two models, a and --model b"):
        model_of("a", "b")
    with pytest.raises(InputError, match="name a model"):
        model_of("", "")


def test_dtype_and_device_reach_the_model(model_folder: Path, tmp_path: Path) -> None:
    """Not only eval, which always had them."""
    out = tmp_path / "x.jsonl"
    line = ["sweep", str(model_folder), "--recipe", "full|bf16", "--split", "validation", "--n", "1", "--processes"]
    line += ["1", "--protocol", "A", "--out", str(out)]
    CliRunner().invoke(app, [*line, "--dtype", "float32"])
    assert json.loads(out.read_text().splitlines()[0])["dtype"] == "float32"
    for words in (line, ["tune", "--model", str(model_folder)], ["analyze", str(model_folder), "--n", "1"],
                  ["calibrate", str(model_folder), "--n", "1"], ["diagnose", str(model_folder), "--n", "1"],
                  ["fit", "kvtc", str(model_folder), "--n", "1"],
                  ["calibrate-skip", str(model_folder), "--n", "1"], ["serve", str(model_folder)],
                  ["demo", str(model_folder), "--n", "1"]):  # fmt: skip
        done = CliRunner().invoke(app, [*words, "--device", "nowhere"])
        assert "no device 'nowhere'" in str(done.exception), words
