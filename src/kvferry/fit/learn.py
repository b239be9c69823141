"""What small networks that are learned beside a frozen model share: a bounded stream, a held-out loss, a good end.

A kind of its own (capsule, translator) says what one example is and what its loss is; this module goes through the
examples, looks at those that are held out after every pass, stops when they get no better, goes on where it was
stopped, and gives back the best weights seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from kvferry.errors import InputError, TrainingError
from kvferry.lazy import torch

T = TypeVar("T")
Q = TypeVar("Q")

SIZES = {"Qwen2-VL-2B": (28, 2, 128), "Qwen2-VL-7B": (28, 4, 128)}
"""Layers, KV heads and channels of models for which sizes and costs are told by formula."""
EVERY = 5
"""One of so many questions is held out."""
ROOM = 512 * 2**20
"""Bytes of examples that a stream keeps; what does not fit is made anew in every pass."""


def held_out(questions: Iterable[Q], fewest: int, what: str) -> tuple[list[Q], list[Q]]:
    """Questions to learn from and, every :data:`EVERY`-th, to judge by.

    Raises
    ------
    InputError
        There are fewer than ``fewest``; says how many there are, and of ``what``.
    """
    given = list(questions)
    if len(given) < fewest:
        raise InputError(f"{what} needs at least {fewest} calibration prompts, not {len(given)}; give it more (--n)")
    judged = given[EVERY - 1 :: EVERY]
    return [x for i, x in enumerate(given) if i % EVERY != EVERY - 1], judged


class Stream(Generic[Q, T]):
    """Examples of questions, made when they are gone through, in the order of the questions.

    Memory is bounded: examples are kept for the next pass as long as they fit :data:`ROOM`, the others are made anew.

    Parameters
    ----------
    make : callable
        The example of a question.
    nbytes : callable
        How many bytes an example takes.
    """

    def __init__(
        self, questions: Sequence[Q], make: Callable[[Q], T], nbytes: Callable[[T], int], room: int | None = None
    ) -> None:
        self._questions, self._make, self._nbytes = questions, make, nbytes
        self._room = ROOM if room is None else room
        self._kept: dict[int, T] = {}
        self.made = 0

    def __len__(self) -> int:
        return len(self._questions)

    def __iter__(self) -> Iterator[T]:
        for i, question in enumerate(self._questions):
            example = self._kept.get(i)
            if example is None:
                example = self._make(question)
                self.made += 1
                if (size := self._nbytes(example)) <= self._room:
                    self._room -= size
                    self._kept[i] = example
            yield example


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Parameters
    ----------
    passes : int
        At most, over all examples.
    rate : float
        Of Adam, at first; it falls to nothing along a cosine over all passes.
    patience : int
        Passes without a better held-out loss after which the training ends.
    """

    passes: int = 12
    rate: float = 2e-3
    patience: int = 3

    def __post_init__(self) -> None:
        if self.passes < 1 or self.patience < 1 or not 0 < self.rate < 1:
            raise InputError("a training takes at least one pass, a patience of one, and a rate between 0 and 1")

    def at(self, share: float) -> float:
        """The rate when this share of all steps is done."""
        return self.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass
class History:
    """The losses.

    Parameters
    ----------
    before : float
        Held-out loss of the network as it began.
    training, held_out : list of float
        Of every pass; the training loss is the mean while it was learning.
    """

    before: float
    training: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The pass of the least held-out loss, from 0."""
        return min(range(len(self.held_out)), key=self.held_out.__getitem__)

    @property
    def idle(self) -> int:
        """Passes since the best one."""
        return len(self.held_out) - 1 - self.best if self.held_out else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, rounded."""
        lists = {"training": self.training, "held_out": self.held_out}
        return {"before": round(self.before, 6)} | {name: [round(x, 6) for x in xs] for name, xs in lists.items()}


def learn(
    network: torch.nn.Module,
    loss: Callable[[T], torch.Tensor],
    training: Iterable[T],
    judged: Iterable[T],
    schedule: Schedule,
    *,
    about: dict[str, Any],
    partial: Path | None = None,
    said: Callable[[History], None] = lambda history: None,
) -> History:
    """Train until the held-out loss gets no better; ``network`` then has the best weights seen.

    Parameters
    ----------
    loss : callable
        Of one example, with the network as it is. What it draws at random it draws from PyTorch's generator.
    training, judged : iterable
        Gone through once in every pass.
    about : dict
        What the training hangs on besides the network (fingerprints, settings), as plain data: a state of another one
        is not gone on with.
    partial : Path, optional
        Where the state is kept after every pass; one that is there is gone on with. It stays at the end, so that
        several trainings make one file: remove it when that is written.
    said : callable
        Gets the losses after every pass.

    Raises
    ------
    TrainingError
        The held-out loss rose from the beginning, or is no number. Nothing has been written.
    InputError
        ``partial`` is of another training.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=schedule.rate)
    torch.manual_seed(0)
    key = json.dumps(about | {"schedule": vars(schedule), "shapes": [list(x.shape) for x in network.parameters()]})
    if partial is not None and partial.is_file():
        history, best = _go_on(partial, key, network, optimizer)
    else:
        history, best = History(_mean_loss(network, loss, judged)), _weights(network)
    while len(history.held_out) < schedule.passes and history.idle < schedule.patience:
        torch.manual_seed(1 + len(history.held_out))  # a training that was stopped goes on as if it had not been
        history.training.append(_one_pass(network, optimizer, loss, training, schedule, len(history.held_out)))
        history.held_out.append(_mean_loss(network, loss, judged))
        if not math.isfinite(history.training[-1] + history.held_out[-1]):
            _end(partial)
            raise TrainingError("the loss is no number any more; lower --rate. Nothing was written")
        if history.idle == 0:
            best = _weights(network)
        said(history)
        if partial is not None:
            _keep(partial, key, network, optimizer, history, best)
    if history.held_out[history.best] >= history.before:
        _end(partial)
        raise TrainingError(
            f"the held-out loss rose from the beginning ({history.before:.4g} before, "
            f"{history.held_out[history.best]:.4g} at best after {len(history.held_out)} passes), so that nothing was "
            "written; give more calibration prompts (--n) or lower --rate"
        )
    network.load_state_dict(best)
    return history


def _one_pass(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[T], torch.Tensor],
    training: Iterable[T], schedule: Schedule, done: int,
) -> float:  # fmt: skip
    """One step for every example; the mean loss."""
    network.train()
    total, count = 0.0, 0
    examples = len(training) if isinstance(training, Sized) else 1
    for i, example in enumerate(training):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(min(1.0, (done + i / examples) / schedule.passes))
        optimizer.zero_grad()
        value = loss(example)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        total, count = total + float(value.detach()), count + 1
    return total / max(count, 1)


def _mean_loss(network: torch.nn.Module, loss: Callable[[T], torch.Tensor], examples: Iterable[T]) -> float:
    """On examples that nothing is learned from; what is drawn at random is the same every time."""
    network.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = [float(loss(example)) for example in examples]
    if not values:
        raise InputError("there is nothing held out to judge a training by; give more calibration prompts (--n)")
    return sum(values) / len(values)


def _weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in network.state_dict().items()}


def _keep(
    partial: Path, key: str, network: torch.nn.Module, optimizer: torch.optim.Optimizer, history: History,
    best: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    from kvferry.testbed.state import save_state

    state = {"key": key, "history": vars(history), "best": best}
    save_state(state | {"network": network.state_dict(), "optimizer": optimizer.state_dict()}, partial)


def _go_on(
    partial: Path, key: str, network: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[History, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError

    from kvferry.testbed.state import load_state

    try:
        state = load_state(partial)
        same = state["key"] == key
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{partial} is no state of a training ({error}); remove it to begin anew") from None
    if not same:
        raise InputError(
            f"{partial} is the state of another training (other models, questions or settings); remove it, "
            "or choose another --out"
        )
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return History(**state["history"]), state["best"]


def _end(partial: Path | None) -> None:
    if partial is not None:
        partial.unlink(missing_ok=True)
