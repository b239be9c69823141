"""A training that ends well, or says so and writes nothing: on lines with a known slope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.errors import InputError, TrainingError
from kvferry.fit.learn import History, Schedule, Stream, held_out, learn

POINTS = [torch.tensor([float(x)]) for x in range(-4, 5)]
ABOUT = {"model": "a"}


def line() -> torch.nn.Linear:
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    return network


def squares(network: torch.nn.Module, slope: float = 0.5) -> Any:
    return lambda x: (network(x) - slope * x).square().mean()


def test_it_finds_the_slope_and_tells_the_losses() -> None:
    network, seen = line(), list[int]()
    history = learn(
        network, squares(network), POINTS, POINTS[:4], Schedule(60, 0.05, 60), about=ABOUT,
        said=lambda h: seen.append(len(h.held_out)),
    )  # fmt: skip
    assert float(network.weight.detach()) == pytest.approx(0.5, abs=0.02)
    assert history.before == pytest.approx(0.25 * (16 + 9 + 4 + 1) / 4)
    assert seen == list(range(1, len(history.held_out) + 1))
    assert history.held_out[history.best] == min(history.held_out) < 0.01 * history.before


def test_it_stops_early_and_gives_the_best_weights_back() -> None:
    """What is held out wants a slope of 0.1, the training one of 1: on the way there it gets better, then worse."""
    network = line()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return squares(network, 1.0 if network.training else 0.1)(x)

    history = learn(network, loss, POINTS, POINTS, Schedule(50, 0.01, 2), about=ABOUT)
    assert history.idle == 2
    assert len(history.held_out) < 50
    assert history.held_out[-1] > history.held_out[history.best]
    judged = float(torch.stack([squares(network, 0.1)(x).detach() for x in POINTS]).mean())
    assert judged == pytest.approx(min(history.held_out))


def test_what_only_gets_worse_is_refused(tmp_path: Path) -> None:
    network, partial = line(), tmp_path / "a.partial"

    def loss(x: torch.Tensor) -> torch.Tensor:
        return squares(network, 1.0 if network.training else 0.0)(x)

    with pytest.raises(TrainingError, match=r"rose from the beginning \(0 before, .*--n"):
        learn(network, loss, POINTS, POINTS, Schedule(9, 0.1, 3), about=ABOUT, partial=partial)
    assert not list(tmp_path.iterdir())


def test_no_number_is_refused() -> None:
    network = line()
    with pytest.raises(TrainingError, match="no number"):
        learn(network, lambda x: network(x).sum() * float("nan"), POINTS, POINTS, Schedule(), about=ABOUT)


def test_one_that_was_stopped_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    schedule, partial = Schedule(6, 0.05, 6), tmp_path / "a.partial"
    whole = line()
    expected = learn(whole, squares(whole), POINTS, POINTS, schedule, about=ABOUT)

    def stop(history: History) -> None:
        if len(history.held_out) == 4:
            raise KeyboardInterrupt

    first = line()
    with pytest.raises(KeyboardInterrupt):
        learn(first, squares(first), POINTS, POINTS, schedule, about=ABOUT, partial=partial, said=stop)
    assert partial.is_file()
    second, seen = line(), list[int]()
    found = learn(
        second, squares(second), POINTS, POINTS, schedule, about=ABOUT, partial=partial,
        said=lambda h: seen.append(len(h.held_out)),
    )  # fmt: skip
    assert seen == [4, 5, 6]
    assert found == expected
    assert torch.equal(second.weight, whole.weight)
    again = line()  # what is finished is not begun anew: several trainings make one file
    assert learn(again, squares(again), [], POINTS, schedule, about=ABOUT, partial=partial) == expected
    assert torch.equal(again.weight, whole.weight)


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    partial = tmp_path / "a.partial"

    def stop(history: History) -> None:
        if len(history.held_out) == 2:
            raise KeyboardInterrupt

    network = line()
    with pytest.raises(KeyboardInterrupt):
        learn(network, squares(network), POINTS, POINTS, Schedule(), about=ABOUT, partial=partial, said=stop)
    with pytest.raises(InputError, match="state of another training"):
        learn(network, squares(network), POINTS, POINTS, Schedule(), about={"model": "b"}, partial=partial)
    partial.write_bytes(b"no state")
    with pytest.raises(InputError, match="no state of a training"):
        learn(network, squares(network), POINTS, POINTS, Schedule(), about=ABOUT, partial=partial)


def test_a_stream_keeps_what_fits() -> None:
    made = list[int]()

    def make(x: int) -> torch.Tensor:
        made.append(x)
        return torch.full((10,), x)

    stream = Stream(range(5), make, lambda x: 4 * len(x), room=100)  # two of 40 bytes
    first = [int(x[0]) for x in stream]
    assert first == [int(x[0]) for x in stream] == [0, 1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4, 2, 3, 4]
    assert (len(stream), stream.made) == (5, 8)


def test_one_of_five_is_held_out_and_too_few_are_counted() -> None:
    training, judged = held_out(range(12), 12, "a capsule")
    assert (training, judged) == ([0, 1, 2, 3, 5, 6, 7, 8, 10, 11], [4, 9])
    with pytest.raises(InputError, match="a capsule needs at least 12 calibration prompts, not 11"):
        held_out(range(11), 12, "a capsule")
