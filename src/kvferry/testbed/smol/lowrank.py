"""A low-rank update of a frozen language model: what is trained, kept in git, and added to the weights in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRankUpdate(nn.Module):
    """``W x + B (A x) * scale`` for every named matrix of all decoder layers; B starts at nothing.

    Parameters
    ----------
    layers : sequence of modules
        Decoder layers, which stay as they are but for a hook on each matrix.
    rank : int
    """

    def __init__(self, layers: Any, rank: int, *, scale: float = 2.0) -> None:
        super().__init__()
        self.scale, self.on = scale, True
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self._paths: dict[str, str] = {}
        for number, layer in enumerate(layers):
            for path, matrix in layer.named_modules():
                name = path.rpartition(".")[2]
                if name not in MATRICES:
                    continue
                key = f"{number}_{name}"
                self.down[key] = nn.Parameter(torch.randn(rank, matrix.in_features) * matrix.in_features**-0.5)
                self.up[key] = nn.Parameter(torch.zeros(matrix.out_features, rank))
                self._paths[key] = f"layers.{number}.{path}.weight"
                matrix.register_forward_hook(self._hook(key))

    def _hook(self, key: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
            if not self.on:
                return None
            small = nn.functional.linear(inputs[0], self.down[key].to(inputs[0].dtype))
            return output + nn.functional.linear(self.scale * small, self.up[key].to(small.dtype))

        return add

    @contextmanager
    def off(self) -> Iterator[None]:
        """The unchanged model, for as long as this lasts."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def learned(self) -> dict[str, torch.Tensor]:
        """``LAYER.NAME.down`` and ``.up``, whose product is what is added to that layer's matrix."""
        found = {}
        for key, path in self._paths.items():
            found[f"{path}.down"], found[f"{path}.up"] = self.down[key].detach(), self.scale * self.up[key].detach()
        return found

    @torch.no_grad()
    def take(self, learned: Mapping[str, torch.Tensor]) -> None:
        """The opposite of :meth:`learned`."""
        for key, path in self._paths.items():
            self.down[key].copy_(learned[f"{path}.down"])
            self.up[key].copy_(learned[f"{path}.up"] / self.scale)
