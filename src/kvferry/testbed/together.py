"""Processes that train one model: `torchrun --nproc-per-node 2 -m ...`, each on lessons of its own.

One process with one thread per core is quicker than threads where cores are shared. Gradients are averaged before every
step, so that all take the same one; the first writes what is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import distributed


class Together:
    """This process among those that `torchrun` started; alone without it.

    Attributes
    ----------
    rank, world : int
        Which of how many; 0 of 1 alone.
    """

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give everybody the first one's numbers, in place."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.data, 0)

    def average(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace each gradient by the mean of everybody's; one that is missing counts as zero."""
        if self.world == 1:
            return
        parameters = list(parameters)
        given = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in given])
        distributed.all_reduce(flat)
        flat /= self.world
        start = 0
        for parameter in parameters:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def same(self, value: float) -> float:
        """The mean of everybody's number, so that all decide alike."""
        if self.world == 1:
            return value
        mean = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(mean)
        return mean.item() / self.world
