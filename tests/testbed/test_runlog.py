"""A stage goes on where it stopped, and ends in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kvferry.errors import InputError
from kvferry.testbed.runlog import Stage
from kvferry.testbed.state import load_state, save_state


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


def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path: Path) -> None:
    """100 steps, the process's end, 100 steps: the same weights, moments and rates as 200 in one go."""

    def run(folder: Path, stops: tuple[int, ...]) -> tuple[dict[str, nn.Module], Stage]:
        for stop in stops:
            torch.manual_seed(0)
            modules: dict[str, nn.Module] = {"slow": nn.Linear(3, 2), "quick": nn.Linear(2, 1)}
            going = stage(folder, modules)
            for step in going:
                data = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
                going.step((modules["quick"](torch.tanh(modules["slow"](data))) ** 2).sum())
                if going.done == stop:
                    going.save()
                    break
        return modules, going

    (once, whole), (twice, again) = run(tmp_path / "a", (200,)), run(tmp_path / "b", (100, 200))
    for name in once:
        assert all(map(torch.equal, once[name].parameters(), twice[name].parameters()))
    first, second = whole.optimizer.state_dict(), again.optimizer.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for number, moments in first["state"].items():
        assert all(torch.equal(value, second["state"][number][key]) for key, value in moments.items())


def test_a_state_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match="older version"):
        stage(tmp_path, {"slow": nn.Linear(2, 1)})


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    state = {"a": shared, "b": [shared.T, (1, 2.5, None, True, "x")], 3: {"inf": float("inf"), "step": torch.tensor(7)}}
    save_state(state, tmp_path / "x.state")
    back = load_state(tmp_path / "x.state")
    assert list(back) == ["a", "b", 3]
    assert torch.equal(back["a"], shared)
    assert torch.equal(back["b"][0], shared.T)
    assert back["b"][1] == (1, 2.5, None, True, "x")
    assert back[3]["inf"] == float("inf")
    assert back[3]["step"].shape == ()
    with pytest.raises(TypeError, match="not set"):
        save_state({"x": {1}}, tmp_path / "y.state")
    assert [path.name for path in tmp_path.iterdir()] == ["x.state"]


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
