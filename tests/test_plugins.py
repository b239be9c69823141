"""Methods from outside: installed distributions, files, and what goes wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry import PluginError, RecipeError, plugins
from kvferry.codecs import CODECS, parse_codec
from kvferry.errors import InputError
from kvferry.evaluate.tasks import TASKS, task_of
from kvferry.modes import MODES, parse_mode, receiver_kind
from kvferry.plugins import IMPORT, Registry, import_files
from kvferry.recipe import Recipe
from kvferry.selection import BUDGETS, MERGES, POLICIES, SCORERS

SCORER = '''
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LastRow:
    """A scorer from outside."""

    power: int = 1

    @property
    def requests(self):
        return ()

    def score(self, cache, evidence):
        return [torch.arange(cache.length).float()[None] ** self.power for _ in cache]
'''
METHODS = f"""
{SCORER}
from dataclasses import replace
from typing import ClassVar

from kvferry.codecs.bf16 import BF16
from kvferry.evaluate.tasks.testbed import Testbed
from kvferry.modes.prompt import PromptMode, PromptReceiver
from kvferry.selection.budgets import Uniform
from kvferry.selection.merge import LookM
from kvferry.selection.modality import Uniform as EvenUniform


class Even(Uniform): pass
class Fair(EvenUniform): pass
class Mean(LookM): pass
class Mine(Testbed):
    name: ClassVar[str] = "mine"
class Half(BF16):
    name: ClassVar[str] = "half"
class Shout(PromptMode):
    NAME: ClassVar[str] = "shout"
    WIRE: ClassVar[int] = 1000
    receiver = PromptReceiver
"""
POINTS = """
[kvferry.scorers]
lastrow = outside_methods:LastRow
broken = outside_methods:Missing
[kvferry.budgets]
even = outside_methods:Even
[kvferry.policies]
fair = outside_methods:Fair
[kvferry.merges]
mean = outside_methods:Mean
number = outside_methods:__name__
[kvferry.codecs]
half = outside_methods:Half
other = outside_methods:Half
[kvferry.modes]
shout = outside_methods:Shout
[kvferry.tasks]
mine = outside_methods:Mine
"""
TABLES: tuple[Registry[object], ...] = (SCORERS, BUDGETS, POLICIES, MERGES, CODECS, MODES, TASKS)  # type: ignore[assignment]


def install(site: Path, name: str, module: str, points: str) -> None:
    """What an installer leaves behind: the module, and its metadata."""
    (site / f"{name}.py").write_text(module)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of installed packages; what was loaded from it is forgotten afterwards."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.delenv(IMPORT, raising=False)
    before = [dict(table) for table in TABLES]
    yield site
    for table, names in zip(TABLES, before, strict=True):
        for name in set(table) - set(names):
            del table[name]
        table._plugged.clear()
    for name in [name for name in sys.modules if name.startswith(("outside_methods", "kvferry_import_"))]:
        del sys.modules[name]
    plugins._imported.clear()


def test_methods_of_an_installed_package(site: Path) -> None:
    install(site, "outside_methods", METHODS, POINTS)
    assert "lastrow" not in SCORERS
    text = "lastrow@0.25,power=2,budget=even,modality=fair,merge=mean|half|zstd"
    assert str(Recipe.parse(text)) == text
    assert parse_codec("half").name == "half"
    assert str(parse_mode("shout")) == "prompt"
    assert receiver_kind(1000).__name__ == "PromptReceiver"
    assert task_of("mine").name == "mine"
    assert task_of("testbed").name == "testbed"


def test_what_is_not_there_is_listed_with_plugins(site: Path) -> None:
    install(site, "outside_methods", METHODS, POINTS)
    with pytest.raises(RecipeError, match=r"did you mean 'lastrow'\?.*broken.*snapkv"):
        Recipe.parse("lastro@0.5")
    assert "outside_methods" not in sys.modules
    with pytest.raises(InputError, match=r"there is no task 'yours'.*mine"):
        task_of("yours")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("broken@0.5", "plug-in outside_methods:Missing of outside_methods.*'broken' of scorers.*AttributeError"),
        ("lastrow@0.5,merge=number", "brings no method of merges, but 'outside_methods'"),
        ("lastrow@0.5|other", "calls its codec 'half', its entry point 'other'"),
    ],
)
def test_a_broken_plugin_is_named_and_breaks_nothing_else(site: Path, recipe: str, expected: str) -> None:
    install(site, "outside_methods", METHODS, POINTS)
    with pytest.raises(PluginError, match=expected):
        Recipe.parse(recipe)
    assert str(Recipe.parse("snapkv@0.5|int4"))
    assert str(Recipe.parse("lastrow@0.5|int4"))


def test_a_name_that_is_taken_is_refused(site: Path) -> None:
    install(site, "outside_methods", SCORER, "[kvferry.scorers]\nsnapkv = outside_methods:LastRow\n")
    with pytest.raises(PluginError, match=r"two of scorers are called 'snapkv': kvferry itself.*of outside_methods"):
        Recipe.parse("snapkv@0.5")
    assert str(Recipe.parse("h2o@0.5|int4"))
    install(site, "outside_methods_too", SCORER, "[kvferry.scorers]\nsnapkv = outside_methods_too:LastRow\n")
    plugins._installed.cache_clear()
    with pytest.raises(PluginError, match="outside_methods_too"):
        Recipe.parse("snapkv@0.5")


def test_a_dictionary_refuses_another_method_of_the_same_name(site: Path) -> None:
    with pytest.raises(PluginError, match="scorers has a 'snapkv' already"):
        SCORERS["snapkv"] = SCORERS["h2o"]
    SCORERS["snapkv"] = SCORERS["snapkv"]


def test_a_file(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IMPORT, "")  # as it was, when this test is over
    (tmp_path / "beside.py").write_text("POWER = 3\n")
    file = tmp_path / "my_method.py"
    file.write_text(f"{SCORER}\nimport beside\nfrom kvferry.selection import SCORERS\nSCORERS['mine'] = LastRow\n")
    import_files([str(file), str(file)])
    assert str(Recipe.parse("mine@0.5,power=3|int4"))
    assert os.environ[IMPORT] == str(file)
    file.write_text("1 / 0")
    plugins._imported.clear()
    with pytest.raises(PluginError, match=r"my_method.py cannot be imported \(ZeroDivisionError"):
        Recipe.parse("whatever@0.5")
    file.unlink()
    with pytest.raises(PluginError, match="there is no file"):
        import_files([str(tmp_path / "nowhere.py")])
    monkeypatch.delenv(IMPORT)
    with pytest.raises(PluginError, match="No module named 'nobody_has_this'"):
        import_files(["nobody_has_this"])


def test_in_worker_processes_and_at_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "my_method.py"
    file.write_text(f"{SCORER}\nfrom kvferry.selection import SCORERS\nSCORERS['mine'] = LastRow\n")
    words = ["sweep", "--model", "testbed/edge", "--n", "2", "--recipe", "mine@0.25|int4", "--processes", "2"]
    words += ["--protocols", "A", "--check", "forced", "--out", "out.jsonl", "--json", "--import", "my_method.py"]
    command = [sys.executable, "-m", "kvferry.cli", *words]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert [row["recipe"] for row in json.loads(ran.stdout)["A"]][1:] == ["mine@0.25|int4"]
