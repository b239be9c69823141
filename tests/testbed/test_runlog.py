"""A stage goes on where it stopped, and ends in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kvferry.testbed.runlog import Stage


def stage(folder: Path, modules: dict[str, nn.Module], *, steps: int = 200, limit: float = float("inf")) -> Stage:
    return Stage(folder, "some", modules, steps=steps, rate=0.1, resume=True, faster={"quick": 3.0}, limit=limit)


def test_modules_learn_at_rates_of_their_own_and_go_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {"slow": nn.Linear(2, 1), "quick": nn.Linear(2, 1)}
    first = stage(tmp_path, modules)
    for _ in zip(first, range(100), strict=False):
        first.step(sum((x.weight.sum() ** 2 for x in modules.values()), torch.zeros(())))
    slow, quick = (group["lr"] for group in first.optimizer.param_groups)
    assert quick == pytest.approx(3 * slow)
    assert slow < 0.1
    other: dict[str, nn.Module] = {"slow": nn.Linear(2, 1), "quick": nn.Linear(2, 1)}
    second = stage(tmp_path, other)
    assert second.done == 100
    assert torch.equal(other["quick"].weight, modules["quick"].weight)
    assert [group["faster"] for group in second.optimizer.param_groups] == [1.0, 3.0]


def test_time_ends_a_stage_and_its_schedule(tmp_path: Path) -> None:
    modules: dict[str, nn.Module] = {"slow": nn.Linear(2, 1)}
    short = stage(tmp_path, modules, limit=10.0)
    rates = []
    for _ in short:
        short.seconds += 1.0
        short.step(modules["slow"].weight.sum() ** 2)
        rates.append(short.optimizer.param_groups[0]["lr"] * 60 / len(rates or [0]))
    assert len(rates) <= 10
    assert rates[-1] < rates[len(rates) // 2]
    assert short.state_path.is_file()
    assert list(stage(tmp_path, modules, limit=10.0)) == []
