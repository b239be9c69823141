"""One training run's folder: resumable state, a log of JSON lines, a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from kvferry.errors import InputError
from kvferry.testbed.state import load_state, save_state
from kvferry.testbed.together import Together

_SAVE = 300.0
"""Seconds after which a state is saved in any case."""


class Stage:
    """A resumable stretch of optimisation over some modules.

    Parameters
    ----------
    folder
        Where `NAME.state` and `log.jsonl` lie.
    name
        The stage's name.
    modules
        What is trained, by name.
    steps, rate
        Number of steps and the peak learning rate of a warm-up and cosine schedule.
    faster
        Modules that learn at a multiple of that rate.
    limit
        Seconds after which the stage ends in any case; the schedule ends with it.
    last
        The rate of the last step, as a share of the peak.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        modules: dict[str, nn.Module],
        *,
        steps: int,
        rate: float,
        resume: bool,
        faster: Mapping[str, float] | None = None,
        limit: float = math.inf,
        last: float = 0.02,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.modules, self.steps, self.rate = folder, name, modules, steps, rate
        self.limit, self.last, self.together = limit, last, Together()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in module.parameters() if p.requires_grad], "faster": (faster or {}).get(key, 1.0)}
            for key, module in modules.items()
        ]
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
        self.done, self.seconds, self._saved = 0, 0.0, time.monotonic()
        self.state_path = folder / f"{name}.state"
        if resume and self.state_path.is_file():
            self._load()
            self.together.share(self.parameters)
        elif resume and (old := folder / f"{name}.pt").is_file():
            raise InputError(f"{old} was written by an older version and is not read (it is a pickle); start anew")

    def _load(self) -> None:
        state = load_state(self.state_path)
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.seconds = state["done"], state["seconds"]

    def save(self) -> None:
        """Write the state so that a killed run goes on from here."""
        self._saved = time.monotonic()
        if not self.together.first:
            return
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
        }
        save_state(state, self.state_path)

    def _learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / 60)
        done = min(1.0, max(step / self.steps, self.seconds / self.limit))
        return self.rate * warm * (self.last + (1 - self.last) * 0.5 * (1 + math.cos(math.pi * done)))

    def step(self, loss: torch.Tensor) -> None:
        """One optimisation step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.together.average(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.done) * group["faster"]
        self.optimizer.step()
        self.done += 1

    def log(self, **values: Any) -> None:
        """Append one line to the run's log."""
        if not self.together.first:
            return
        line = {"stage": self.name, "step": self.done, "seconds": round(self.seconds, 1), **values}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def __iter__(self) -> Iterator[int]:
        """The steps still to do; saves every 100, every five minutes and at the end."""
        if self.done >= self.steps or self.seconds >= self.limit:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeRemainingColumn()) as progress:
            bar = progress.add_task(self.name, total=self.steps, completed=self.done)
            while self.done < self.steps and self.seconds < self.limit:
                began, before = time.monotonic(), self.done
                yield self.done
                if self.done == before:
                    raise RuntimeError("a training step did not call Stage.step")
                self.seconds = self.together.same(self.seconds + time.monotonic() - began)
                progress.update(bar, completed=self.done)
                ended = self.done == self.steps or self.seconds >= self.limit
                if ended or self.done % 100 == 0 or time.monotonic() - self._saved > _SAVE:
                    self.save()
