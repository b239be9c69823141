"""Commands that records carry name no place on the machine where they were typed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from kvferry.cli.console import typed


def test_paths_are_told_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "project"
    here.mkdir()
    monkeypatch.chdir(here)
    words = [
        "sweep", "--out", f"{here}/out/a.jsonl", f"--data={tmp_path}/shared/squad", "--recipe",
        "full|transform:8@/home/ann/deep/a.profile,x=1|zstd", "/etc/ann/scene.png", "what is 1/2?", "--mode",
        "image:60", "testbed/cloud", "../b/c.json",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["/usr/bin/kvferry", *words])
    assert typed() == (
        "kvferry sweep --out out/a.jsonl --data=../shared/squad --recipe 'full|transform:8@a.profile,x=1|zstd' "
        "scene.png 'what is 1/2?' --mode image:60 testbed/cloud ../b/c.json"
    )
    assert typed("python -m study").startswith("python -m study sweep ")


def commands(x: Any) -> Iterator[str]:
    """Every command in a record."""
    if isinstance(x, dict):
        for key, value in x.items():
            yield from [value] if key == "command" and isinstance(value, str) else commands(value)
    elif isinstance(x, list):
        for value in x:
            yield from commands(value)


def test_what_is_shipped_names_no_machine() -> None:
    found: list[str] = []
    for file in [*Path("study/results").rglob("*.json*"), *Path("benchmarks/results").glob("*.json")]:
        text = file.read_text()
        found += commands(json.loads(text.partition("\n")[0] if file.suffix == ".jsonl" else text))
    for file in [*Path("testbed").rglob("*.profile"), *Path("testbed").rglob("*.translator")]:
        with safe_open(file, "numpy") as opened:
            for value in (opened.metadata() or {}).values():
                found += commands(json.loads(value)) if value.startswith("{") else []
    assert len(found) > 20
    assert [x for x in found if re.search(r"(?:^|[\s=@'\"])/\w", x)] == []
