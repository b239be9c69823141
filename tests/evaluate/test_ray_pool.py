"""A sweep on a local Ray cluster gives what it gives in one process."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import pytest

from kvferry.errors import InputError
from kvferry.evaluate.ray_pool import over_ray
from kvferry.evaluate.records import read
from kvferry.evaluate.sweep import Sweep, run

RECIPES = ("full|bf16", "none|bf16", "snapkv@0.25|int4")


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"kvferry\[ray\]"):
        list(over_ray(str, [1], "local"))


def test_two_questions_on_a_local_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is in the extra 'ray'")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    plan = Sweep("testbed/edge", RECIPES, ("A",), "validation", 2, check="forced")
    alone = {(x.index, x.protocol): x for x in run(plan, tmp_path / "alone.jsonl")}
    spread = list(run(plan, tmp_path / "spread.jsonl", ray="local"))
    assert {(x.index, x.protocol): x for x in spread} == alone
    assert read(tmp_path / "spread.jsonl")[1] == spread
    # What is there already is not asked for again, and where nothing is left no cluster is needed.
    assert list(run(plan, tmp_path / "spread.jsonl", ray=f"127.0.0.1:{os.getpid()}")) == []
