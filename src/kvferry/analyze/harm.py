"""What dropping does to the next token: the same share of visual tokens, of text tokens, or the whole picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.analyze.observe import Observation
from kvferry.analyze.running import Array, Reservoir, Running
from kvferry.lazy import torch


def divergence(logits: torch.Tensor) -> Array:
    """KL in nats from the first row's distribution to each of the others: ``[1 + k, vocabulary]`` to ``[k]``."""
    logs = logits.double().log_softmax(-1)
    result: Array = (logs[0].exp() * (logs[0] - logs[1:])).sum(-1).numpy()
    return result


@dataclass(frozen=True)
class HarmResult:
    """Harm of each of :data:`kvferry.analyze.observe.DROPS`.

    Parameters
    ----------
    divergence, margin : ``[drops]``
        Mean KL in nats to the full cache's next-token distribution.
    unchanged : ``[drops]``
        Share of prompts whose most likely next token stays.
    samples : ``[n, 1 + 2 * drops]``
        Per prompt: whether the question needs its picture (:attr:`Observation.needs`), KL, unchanged (0 or 1).
    """

    divergence: Array
    margin: Array
    unchanged: Array
    samples: Array


class Harm:
    """Compares next tokens after dropping with the full cache's own.

    Dropping follows prefill (protocol A): what the question's tokens have already taken from the picture stays.
    """

    def __init__(self) -> None:
        self._lost, self._same = Running(), Running()
        self._samples = Reservoir()

    def add(self, seen: Observation) -> None:
        """One prompt; without both modalities nothing was dropped."""
        if seen.logits is None:
            return
        lost = divergence(seen.logits)
        best = seen.logits.argmax(-1)
        same = (best[1:] == best[0]).double().numpy()
        self._lost.add(lost)
        self._same.add(same)
        self._samples.add(np.concatenate([[seen.needs], lost, same]))

    def result(self) -> HarmResult:
        """What was found so far."""
        return HarmResult(self._lost.mean, self._lost.margin, self._same.mean, self._samples.rows)
